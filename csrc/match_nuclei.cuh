// The kernels of match_nuclei.cu.
#pragma once

#include "pack.cuh"

#include <cstdint>
#include <limits>

namespace muse_fast {

// Keeps a running sum of counts below zero: there are fewer than 2^31 rows and 2^31 images, so fewer than 2^62 pairs.
constexpr int64_t kBroken = std::numeric_limits<int64_t>::min() / 2;

__global__ void check_kernel(Pack pack, int64_t* broken) {
  using Word = unsigned long long;
  if (count_faults(pack) > 0) atomicExch(reinterpret_cast<Word*>(broken), static_cast<Word>(kBroken));
}

// Counting: places[s + 1] = pairs of segment s. Filling: places[s] = place of its first pair in teacher and student,
// which end after `capacity` pairs; in a broken pack all places are negative.
template <bool kFill>
__global__ void match_kernel(Pack pack, int64_t* places, int64_t* teacher, int64_t* student, int64_t capacity) {
  for (int64_t segment = blockIdx.x; segment < pack.num_segments(); segment += gridDim.x) {
    const int64_t b = segment % pack.num_rois;
    const int64_t g = segment / pack.num_rois / (pack.num_views - 1);
    const int64_t other = segment / pack.num_rois % (pack.num_views - 1);
    const int64_t v = other < g ? other : other + 1;
    const Rows of_teacher = pack.rows(g * pack.num_rois + b), of_student = pack.rows(v * pack.num_rois + b);

    int64_t place = kFill ? places[segment] : 0;
    for (int64_t tile = of_teacher.begin; tile < of_teacher.end; tile += blockDim.x) {
      const int64_t row = tile + threadIdx.x;
      const int64_t match = row < of_teacher.end ? find(pack.index, of_student, pack.index[row]) : kNone;
      const Prefix matches = block_prefix(match != kNone);
      const int64_t mine = place + matches.before;
      if (kFill && match != kNone && mine >= 0 && mine < capacity) {
        teacher[mine] = row;
        student[mine] = match;
      }
      place += matches.total;
    }
    if (!kFill && threadIdx.x == 0) places[segment + 1] = place;
  }
}

}  // namespace muse_fast
