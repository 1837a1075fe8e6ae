// Runs the kernels of match_nuclei.cu and nulo_rows.cu on the arrays that a folder holds (test_cuda_on_cpu.py).
#include "cuda_on_cpu.h"

#include "match_nuclei.cuh"
#include "nulo_rows.cuh"

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

namespace {

using namespace muse_fast;
using cuda_on_cpu::launch;

struct Settings {
  int64_t num_rois, num_globals, blocks, threads, teacher_capacity, student_capacity, pair_capacity, global_size,
      local_size;
};

struct Folder {
  std::filesystem::path path;

  template <typename T>
  std::vector<T> read(const std::string& name) const {
    std::vector<T> values(file_size(path / name) / sizeof(T));
    std::ifstream(path / name).read(reinterpret_cast<char*>(values.data()), values.size() * sizeof(T));
    return values;
  }

  template <typename T>
  void write(const std::string& name, const std::vector<T>& values) const {
    std::ofstream(path / name).write(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
  }
};

void match_nuclei(const Folder& folder, const Pack& pack, const Settings& settings) {
  const auto run = [&](auto kernel, auto... args) { launch(kernel, settings.blocks, settings.threads, pack, args...); };
  std::vector<int64_t> places(pack.num_segments() + 1);
  std::vector<int64_t> teacher(settings.pair_capacity, kNone), student(settings.pair_capacity, kNone);
  run(check_kernel, places.data());
  run(match_kernel<false>, places.data(), nullptr, nullptr, 0);
  std::partial_sum(places.begin(), places.end(), places.begin());
  run(match_kernel<true>, places.data(), teacher.data(), student.data(), settings.pair_capacity);
  folder.write("match_teacher", teacher);
  folder.write("match_student", student);
  folder.write("match_count", std::vector{places.back()});
}

// The levels of one resolution: their values one after the other, and per level channels, height, width and strides.
struct Levels {
  std::vector<float> values;
  std::vector<int64_t> numbers;

  Levels(const Folder& folder, const std::string& name)
      : values(folder.read<float>(name + "_values")), numbers(folder.read<int64_t>(name + "_numbers")) {}

  Maps<float> maps(int64_t images, int64_t view_size) const {
    Maps<float> maps{};
    maps.view_size = view_size;
    const float* begin = values.data();
    for (auto it = numbers.begin(); it != numbers.end(); it += 7) {
      maps.levels[maps.num_levels++] = {begin, it[3], it[4], it[5], it[6], int(it[0]), int(it[1]), int(it[2])};
      begin += images * it[0] * it[1] * it[2];
    }
    return maps;
  }
};

void nulo_rows(const Folder& folder, const Pack& pack, const Settings& settings) {
  const auto xy = folder.read<float>("xy");
  const Levels of_teacher(folder, "teacher"), of_globals(folder, "globals"), of_locals(folder, "locals");
  const int64_t globals = pack.num_globals * pack.num_rois;
  const Maps<float> teacher_maps = of_teacher.maps(globals, settings.global_size);
  const Maps<float> global_maps = of_globals.maps(globals, settings.global_size);
  const Maps<float> local_maps = of_locals.maps(pack.num_images() - globals, settings.local_size);
  int64_t width = 0;
  for (const Level<float>& level : teacher_maps.levels) width += level.channels;

  // What no thread writes keeps a value that no result has.
  std::vector<float> teacher(settings.teacher_capacity * width, 7), student(settings.student_capacity * width, 7);
  std::vector<int64_t> teacher_kept(settings.teacher_capacity, -7), student_kept(settings.student_capacity, -7);
  std::vector<int64_t> teacher_rows(settings.pair_capacity, -7), student_rows(settings.pair_capacity, -7);
  std::vector<int64_t> counts(3, -7);
  std::vector<int32_t> marks((pack.num_globals + 2) * pack.num_rows);
  std::vector<int32_t> block_counts((pack.num_globals + 3) * settings.blocks);
  const NuloRows<float> args{pack,
                             xy.data(),
                             {teacher_maps, {}, settings.teacher_capacity, width, teacher_kept.data(), teacher.data()},
                             {global_maps, local_maps, settings.student_capacity, width, student_kept.data(),
                              student.data()},
                             settings.pair_capacity,
                             teacher_rows.data(),
                             student_rows.data(),
                             counts.data(),
                             marks.data(),
                             block_counts.data()};
  launch(nulo_rows_kernel<float>, settings.blocks, settings.threads, args);
  folder.write("teacher", teacher);
  folder.write("student", student);
  folder.write("teacher_rows", teacher_rows);
  folder.write("student_rows", student_rows);
  folder.write("counts", counts);
  folder.write("student_kept", student_kept);
}

}  // namespace

int main(int, char** arguments) {
  const Folder folder{arguments[1]};
  const auto numbers = folder.read<int64_t>("settings");
  const Settings settings{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4],
                          numbers[5], numbers[6], numbers[7], numbers[8]};
  const auto index = folder.read<int32_t>("index"), offsets = folder.read<int32_t>("offsets");
  const int64_t images = offsets.size() - 1;
  const Pack pack{index.data(), offsets.data(), int64_t(index.size()), settings.num_rois, images / settings.num_rois,
                  settings.num_globals};
  match_nuclei(folder, pack, settings);
  nulo_rows(folder, pack, settings);
}
