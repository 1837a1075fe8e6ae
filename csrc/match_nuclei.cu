// The pairs of match_nuclei.cpp on the device, in the same order. A block serves one segment (global g, view v != g,
// ROI b), a thread one teacher row: it looks its nucleus up in the student's sorted rows. The first pass counts the
// pairs of every segment, their running sum says where each segment starts, the second pass writes. No atomics.
//
// The results have exactly P rows, so the host waits once, for P.
#include "match_nuclei.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 128;  // a view shows some 60 to 300 nuclei
constexpr int64_t kNone = -1;
// Keeps a running sum of counts below zero: there are fewer than 2^31 rows and 2^31 images, so fewer than 2^62 pairs.
constexpr int64_t kBroken = std::numeric_limits<int64_t>::min() / 2;

struct Rows {
  int64_t begin, end;
};

struct Pack {
  const int32_t* index;    // [N]
  const int32_t* offsets;  // [V * B + 1]
  int64_t num_rows, num_rois, num_views, num_globals;

  __host__ __device__ int64_t num_images() const { return num_views * num_rois; }
  __host__ __device__ int64_t num_segments() const { return num_globals * (num_views - 1) * num_rois; }

  // Clamped: whether the offsets are sound is known only after the passes that read them.
  __device__ Rows rows(int64_t image) const {
    const int64_t begin = min(max(int64_t{offsets[image]}, int64_t{0}), num_rows);
    return {begin, min(max(int64_t{offsets[image + 1]}, begin), num_rows)};
  }
};

// The row of `rows`, which are sorted by index, that holds `id`, or kNone.
__device__ int64_t find(const int32_t* index, Rows rows, int32_t id) {
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

// How many threads of the block before this one say yes, and of all of them. Every thread of the block must call it.
__device__ int rank_in_block(bool yes, int& total) {
  __shared__ int warp_totals[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned ballot = __ballot_sync(~0u, yes);
  if (lane == 0) warp_totals[warp] = __popc(ballot);
  __syncthreads();
  int rank = __popc(ballot & ((1u << lane) - 1));
  total = 0;
  for (int other = 0; other < kThreads / 32; ++other) {
    if (other < warp) rank += warp_totals[other];
    total += warp_totals[other];
  }
  __syncthreads();  // the next call writes warp_totals
  return rank;
}

// Sets *broken to kBroken where muse_fast::check_rows would throw.
__global__ void check_kernel(Pack pack, int64_t* broken) {
  for (int64_t image = blockIdx.x; image < pack.num_images(); image += gridDim.x) {
    const int32_t begin = pack.offsets[image], end = pack.offsets[image + 1];
    const bool first = image == 0, last = image == pack.num_images() - 1;
    bool sound = begin <= end && (!first || begin == 0) && (!last || end == pack.num_rows);
    const Rows rows = pack.rows(image);
    for (int64_t row = rows.begin + 1 + threadIdx.x; row < rows.end; row += kThreads) {
      sound = sound && pack.index[row - 1] < pack.index[row];
    }
    if (!sound) *broken = kBroken;  // all that write, write the same
  }
}

// Counting: places[s + 1] = pairs of segment s. Filling: places[s] = place of its first pair in teacher and student.
template <bool kFill>
__global__ void match_kernel(Pack pack, int64_t* places, int64_t* teacher, int64_t* student) {
  for (int64_t segment = blockIdx.x; segment < pack.num_segments(); segment += gridDim.x) {
    const int64_t b = segment % pack.num_rois;
    const int64_t g = segment / pack.num_rois / (pack.num_views - 1);
    const int64_t other = segment / pack.num_rois % (pack.num_views - 1);
    const int64_t v = other < g ? other : other + 1;
    const Rows of_teacher = pack.rows(g * pack.num_rois + b), of_student = pack.rows(v * pack.num_rois + b);

    int64_t place = kFill ? places[segment] : 0;
    for (int64_t tile = of_teacher.begin; tile < of_teacher.end; tile += kThreads) {
      const int64_t row = tile + threadIdx.x;
      const int64_t match = row < of_teacher.end ? find(pack.index, of_student, pack.index[row]) : kNone;
      int matches;
      const int rank = rank_in_block(match != kNone, matches);
      if (kFill && match != kNone) {
        teacher[place + rank] = row;
        student[place + rank] = match;
      }
      place += matches;
    }
    if (!kFill && threadIdx.x == 0) places[segment + 1] = place;
  }
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, cudaStream_t stream, Arguments... arguments) {
  if (blocks == 0) return;
  kernel<<<std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max()), kThreads, 0, stream>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor running_sum(const Tensor& tensor) {
  namespace stable = torch::stable::detail;
  std::array<StableIValue, 3> stack{stable::from(tensor), stable::from(int64_t{0}),
                                    stable::from(std::optional<ScalarType>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return stable::to<Tensor>(stack[0]);
}

Tensor to_host(const Tensor& tensor) {
  return torch::stable::to(tensor, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// index [N] int32, offsets [V * B + 1] int32 -> teacher [P] int64, student [P] int64.
std::tuple<Tensor, Tensor> match_nuclei(const Tensor& index, const Tensor& offsets, int64_t num_rois,
                                        int64_t num_globals) {
  const int64_t num_views = muse_fast::check_match_nuclei(index, offsets, num_rois, num_globals);
  STD_TORCH_CHECK(index.get_device_index() == offsets.get_device_index(), "match_nuclei: index is on device ",
                  index.get_device_index(), ", offsets on ", offsets.get_device_index());
  const torch::stable::accelerator::DeviceGuard guard(index.get_device_index());
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index.get_device_index(), &current));
  const auto stream = static_cast<cudaStream_t>(current);

  const Pack pack{index.const_data_ptr<int32_t>(), offsets.const_data_ptr<int32_t>(), index.numel(), num_rois,
                  num_views, num_globals};
  Tensor counts = torch::stable::new_zeros(index, {pack.num_segments() + 1}, ScalarType::Long);
  int64_t* of_counts = counts.mutable_data_ptr<int64_t>();
  launch(check_kernel, pack.num_images(), stream, pack, of_counts);
  launch(match_kernel<false>, pack.num_segments(), stream, pack, of_counts, nullptr, nullptr);
  Tensor starts = running_sum(counts);  // [S + 1], the last entry is P

  Tensor last = torch::stable::narrow(starts, 0, pack.num_segments(), 1);
  const int64_t num_pairs = *to_host(last).const_data_ptr<int64_t>();  // the one wait
  if (num_pairs < 0) {
    const Tensor host_index = to_host(index), host_offsets = to_host(offsets);
    muse_fast::check_rows(host_index.const_data_ptr<int32_t>(), pack.num_rows,
                          host_offsets.const_data_ptr<int32_t>(), pack.num_images());
    STD_TORCH_CHECK(false, "match_nuclei: index or offsets changed while they were read");
  }

  Tensor teacher = torch::stable::new_empty(index, {num_pairs}, ScalarType::Long);
  Tensor student = torch::stable::new_empty(index, {num_pairs}, ScalarType::Long);
  const int64_t blocks = num_pairs == 0 ? 0 : pack.num_segments();
  launch(match_kernel<true>, blocks, stream, pack, starts.mutable_data_ptr<int64_t>(),
         teacher.mutable_data_ptr<int64_t>(), student.mutable_data_ptr<int64_t>());
  return {teacher, student};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(muse_fast, CUDA, library) {
  library.impl("match_nuclei", TORCH_BOX(&match_nuclei));
}
