// match_nuclei and the sampling of the rows that stand in a pair, in one cooperative launch (nulo_rows.cuh).
#include "nulo_rows.cuh"

#include "cuda_pack.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

namespace {

using muse_fast::Maps;
using muse_fast::NuloRows;
using muse_fast::nulo_rows_kernel;
using muse_fast::Pack;
using muse_fast::Side;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;

int64_t width_of(const std::vector<Tensor>& levels) {
  int64_t width = 0;
  for (const Tensor& level : levels) width += level.size(1);
  return width;
}

// What the kernel relies on to stay inside the levels.
void check_levels(const std::vector<Tensor>& levels, const std::vector<Tensor>& of_teacher, int64_t images,
                  int64_t width, const Tensor& xy) {
  STD_TORCH_CHECK(!levels.empty() && levels.size() <= muse_fast::kMaxLevels && width_of(levels) == width,
                  "nulo_rows: expected 1 to ", muse_fast::kMaxLevels, " levels of ", width, " channels together");
  for (const Tensor& level : levels) {
    STD_TORCH_CHECK(level.dim() == 4 && level.size(0) == images &&
                        level.scalar_type() == of_teacher[0].scalar_type() &&
                        level.get_device_index() == xy.get_device_index(),
                    "nulo_rows: a level must be [", images, ", c, h, w], of the type and device of the others");
    const auto fits = [&](int64_t axis) {
      return 0 < level.size(axis) && level.size(axis) <= levels[0].size(axis) && level.size(axis) < 1 << 16;
    };
    STD_TORCH_CHECK(fits(2) && fits(3), "nulo_rows: level 0 must be the finest, and sizes in 1..65535");
  }
}

// Everything of one resolution, and how many pixels its views have along a side.
struct Resolution {
  const std::vector<Tensor>& levels;
  int64_t view_size;

  template <typename T>
  Maps<T> maps() const {
    Maps<T> maps{};
    maps.view_size = static_cast<int>(view_size);
    for (const Tensor& level : levels) {
      maps.levels[maps.num_levels++] = {static_cast<const T*>(level.const_data_ptr()),
                                        level.stride(0),
                                        level.stride(1),
                                        level.stride(2),
                                        level.stride(3),
                                        static_cast<int>(level.size(1)),
                                        static_cast<int>(level.size(2)),
                                        static_cast<int>(level.size(3))};
    }
    return maps;
  }
};

template <typename T>
Side<T> to_side(const Maps<T>& globals, const Maps<T>& locals, const Tensor& kept, const Tensor& rows) {
  return {globals, locals, rows.size(0), rows.size(1), kept.mutable_data_ptr<int64_t>(),
          static_cast<T*>(rows.mutable_data_ptr())};
}

// teacher [C_t, D], student [C_s, D], teacher_rows [C_p], student_rows [C_p], counts [3] and, for the backward,
// student_kept [C_s]: the packed row behind each student row, or -1.
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// As many blocks as there is work for, and as can wait for each other at a grid barrier.
template <typename T>
int64_t num_blocks(int64_t work) {
  int device = 0, processors = 0, blocks = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, nulo_rows_kernel<T>, kThreads, 0));
  return std::clamp<int64_t>(work, 1, int64_t{processors} * blocks);
}

template <typename T>
void launch(const Pack& pack, const Tensor& xy, const Resolution& of_teacher, const Resolution& globals,
            const Resolution& locals, const Tensor& teacher_kept, const Results& results) {
  const auto& [teacher, student, teacher_rows, student_rows, counts, student_kept] = results;
  const int64_t slots = std::max(teacher.size(0), student.size(0));
  const int64_t blocks = num_blocks<T>(std::max(pack.num_rows, slots * 32) / kThreads + 1);  // a warp serves a slot
  const Tensor marks = torch::stable::new_empty(xy, {pack.num_globals + 2, pack.num_rows}, ScalarType::Int);
  const Tensor block_counts = torch::stable::new_empty(xy, {pack.num_globals + 3, blocks}, ScalarType::Int);
  NuloRows<T> args{pack,
                   xy.const_data_ptr<float>(),
                   to_side(of_teacher.maps<T>(), Maps<T>{}, teacher_kept, teacher),
                   to_side(globals.maps<T>(), locals.maps<T>(), student_kept, student),
                   teacher_rows.size(0),
                   teacher_rows.mutable_data_ptr<int64_t>(),
                   student_rows.mutable_data_ptr<int64_t>(),
                   counts.mutable_data_ptr<int64_t>(),
                   marks.mutable_data_ptr<int32_t>(),
                   block_counts.mutable_data_ptr<int32_t>()};
  void* parameters[] = {&args};
  STD_CUDA_CHECK(cudaLaunchCooperativeKernel(nulo_rows_kernel<T>, dim3(blocks), dim3(kThreads), parameters, 0,
                                             muse_fast::current_stream(xy)));
}

Results nulo_rows(const std::vector<Tensor>& teacher_levels, const std::vector<Tensor>& global_levels,
                  const std::vector<Tensor>& local_levels, int64_t global_size, int64_t local_size, const Tensor& xy,
                  const Tensor& index, const Tensor& offsets, int64_t num_rois, int64_t num_globals,
                  int64_t teacher_capacity, int64_t student_capacity, int64_t pair_capacity) {
  const Pack pack = muse_fast::make_pack(index, offsets, num_rois, num_globals);
  STD_TORCH_CHECK(xy.scalar_type() == ScalarType::Float && xy.is_contiguous() && xy.numel() == 2 * pack.num_rows &&
                      xy.get_device_index() == index.get_device_index(),
                  "nulo_rows: xy must be contiguous float32 [", pack.num_rows, ", 2] on the device of index");
  STD_TORCH_CHECK(teacher_capacity >= 0 && student_capacity >= 0 && pair_capacity >= 0,
                  "nulo_rows: capacities must not be negative");
  const int64_t globals = num_globals * num_rois, locals = pack.num_images() - globals;
  const int64_t width = width_of(teacher_levels);
  check_levels(teacher_levels, teacher_levels, globals, width, xy);
  check_levels(global_levels, teacher_levels, globals, width, xy);
  if (locals > 0) check_levels(local_levels, teacher_levels, locals, width, xy);

  const torch::stable::accelerator::DeviceGuard guard(xy.get_device_index());
  const ScalarType type = teacher_levels[0].scalar_type();
  const auto rows = [&](int64_t capacity) { return torch::stable::new_empty(xy, {capacity, width}, type); };
  const auto integers = [&](int64_t size) { return torch::stable::new_empty(xy, {size}, ScalarType::Long); };
  const Tensor teacher_kept = integers(teacher_capacity);
  const Results results{rows(teacher_capacity),  rows(student_capacity), integers(pair_capacity),
                        integers(pair_capacity), integers(3),            integers(student_capacity)};
  const auto launch_as = [&]<typename T>(T) {
    launch<T>(pack, xy, {teacher_levels, global_size}, {global_levels, global_size}, {local_levels, local_size},
              teacher_kept, results);
  };
  switch (type) {
    case ScalarType::Float:
      launch_as(float{});
      break;
    case ScalarType::Half:
      launch_as(torch::headeronly::Half{});
      break;
    case ScalarType::BFloat16:
      launch_as(torch::headeronly::BFloat16{});
      break;
    default:
      STD_TORCH_CHECK(false, "nulo_rows: levels must be float32, float16 or bfloat16");
  }
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(muse_fast, CUDA, library) {
  library.impl("nulo_rows", TORCH_BOX(&nulo_rows));
}
