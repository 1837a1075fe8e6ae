// Runs the kernels of match_nuclei.cu on arrays in files of a folder (test_cuda_on_cpu.py).
#include "cuda_on_cpu.h"

#include "match_nuclei.cuh"

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
  int64_t num_rois, num_globals, blocks, threads, capacity;
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
  std::vector<int64_t> teacher(settings.capacity, kNone), student(settings.capacity, kNone);
  run(check_kernel, places.data());
  run(match_kernel<false>, places.data(), nullptr, nullptr, 0);
  std::partial_sum(places.begin(), places.end(), places.begin());
  run(match_kernel<true>, places.data(), teacher.data(), student.data(), settings.capacity);
  folder.write("teacher", teacher);
  folder.write("student", student);
  folder.write("count", std::vector{places.back()});
}

}  // namespace

int main(int, char** arguments) {
  const Folder folder{arguments[1]};
  const auto numbers = folder.read<int64_t>("settings");
  const Settings settings{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
  const auto index = folder.read<int32_t>("index"), offsets = folder.read<int32_t>("offsets");
  const int64_t images = offsets.size() - 1;
  const Pack pack{index.data(), offsets.data(), int64_t(index.size()), settings.num_rois, images / settings.num_rois,
                  settings.num_globals};
  match_nuclei(folder, pack, settings);
}
