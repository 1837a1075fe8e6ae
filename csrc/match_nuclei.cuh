// The kernels of match_nuclei.cu. They do not depend on torch: tests/support/cuda_on_cpu.h runs them on the CPU.
#pragma once

#include <cstdint>
#include <limits>

#ifdef __CUDACC__
// Memory that the threads of a block share, one per type T.
template <typename T>
__device__ T& block_shared() {
  __shared__ T memory;
  return memory;
}
#endif

namespace muse_fast {

constexpr int64_t kNone = -1;

struct Rows {
  int64_t begin, end;
};

// The packed nuclei.
struct Pack {
  const int32_t* index;    // [N]
  const int32_t* offsets;  // [V * B + 1]
  int64_t num_rows, num_rois, num_views, num_globals;

  __host__ __device__ int64_t num_images() const { return num_views * num_rois; }
  __host__ __device__ int64_t num_segments() const { return num_globals * (num_views - 1) * num_rois; }

  // Clamped, because invalid offsets are reported only after they were used.
  __device__ Rows rows(int64_t image) const {
    const int64_t begin = min(max(int64_t{offsets[image]}, int64_t{0}), num_rows);
    return {begin, min(max(int64_t{offsets[image + 1]}, begin), num_rows)};
  }
};

// The row of `rows`, sorted by index, whose index is `id`, or kNone.
__device__ inline int64_t find(const int32_t* index, Rows rows, int32_t id) {
  const int64_t end = rows.end;
  while (rows.begin < rows.end) {
    const int64_t middle = (rows.begin + rows.end) / 2;
    if (index[middle] < id) {
      rows.begin = middle + 1;
    } else {
      rows.end = middle;
    }
  }
  return rows.begin < end && index[rows.begin] == id ? rows.begin : kNone;
}

struct Prefix {
  int before, total;
};

// The sum of `value` over the threads of the block before this one, and over all of them. Every thread must call it.
__device__ inline Prefix block_prefix(int value) {
  int(&warp_totals)[32] = block_shared<int[32]>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;  // up to and including this lane
  for (int step = 1; step < 32; step *= 2) {
    const int lower = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += lower;
  }
  if (lane == 31) warp_totals[warp] = sum;
  __syncthreads();
  Prefix prefix{sum - value, 0};
  for (int other = 0; other < static_cast<int>(blockDim.x) / 32; ++other) {
    if (other < warp) prefix.before += warp_totals[other];
    prefix.total += warp_totals[other];
  }
  __syncthreads();  // the next call writes warp_totals
  return prefix;
}

// The number of faults that this thread finds, with the rules of muse_fast::check_rows. A block reads one image at a
// time.
__device__ inline int count_faults(const Pack& pack) {
  int faults = 0;
  for (int64_t image = blockIdx.x; image < pack.num_images(); image += gridDim.x) {
    const int32_t begin = pack.offsets[image], end = pack.offsets[image + 1];
    const bool first = image == 0, last = image == pack.num_images() - 1;
    faults += begin > end || (first && begin != 0) || (last && end != pack.num_rows);
    const Rows rows = pack.rows(image);
    for (int64_t row = rows.begin + 1 + threadIdx.x; row < rows.end; row += blockDim.x) {
      faults += pack.index[row - 1] >= pack.index[row];
    }
  }
  return faults;
}

// Keeps a running sum of counts below zero: there are fewer than 2^31 rows and 2^31 images, so fewer than 2^62 pairs.
constexpr int64_t kBroken = std::numeric_limits<int64_t>::min() / 2;

__global__ void check_kernel(Pack pack, int64_t* broken) {
  using Word = unsigned long long;
  if (count_faults(pack) > 0) atomicExch(reinterpret_cast<Word*>(broken), static_cast<Word>(kBroken));
}

// Counting: places[s + 1] = number of pairs of segment s. Filling: places[s] = position of its first pair in teacher
// and student, which end after `capacity` pairs; in an invalid pack all positions are negative.
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
