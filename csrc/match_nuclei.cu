// The pairs of match_nuclei.cpp on the device, in the same order. A block handles one segment (global g, view v != g,
// ROI b), and a thread one teacher row: it looks up the row's nucleus in the student's sorted rows. The first pass
// counts the pairs of every segment, their running sum is where each segment starts, and the second pass writes. No
// atomics, except for the flag of an invalid pack.
#include "match_nuclei.h"

#include "match_nuclei.cuh"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

namespace {

using muse_fast::Pack;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

constexpr int kThreads = 128;  // a view shows about 60 to 300 nuclei

Pack make_pack(const Tensor& index, const Tensor& offsets, int64_t num_rois, int64_t num_globals) {
  const int64_t num_views = muse_fast::check_match_nuclei(index, offsets, num_rois, num_globals);
  STD_TORCH_CHECK(index.get_device_index() == offsets.get_device_index(), "match_nuclei: index is on device ",
                  index.get_device_index(), ", offsets on ", offsets.get_device_index());
  return {index.const_data_ptr<int32_t>(), offsets.const_data_ptr<int32_t>(), index.numel(), num_rois, num_views,
          num_globals};
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
  return static_cast<cudaStream_t>(current);
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

// Where the pairs of every segment start, [S + 1]. The last entry is P; all are negative if the pack is invalid.
Tensor count_pairs(const Pack& pack, const Tensor& index) {
  Tensor counts = torch::stable::new_zeros(index, {pack.num_segments() + 1}, ScalarType::Long);
  int64_t* places = counts.mutable_data_ptr<int64_t>();
  const cudaStream_t stream = current_stream(index);
  launch(muse_fast::check_kernel, pack.num_images(), stream, pack, places);
  launch(muse_fast::match_kernel<false>, pack.num_segments(), stream, pack, places, nullptr, nullptr, 0);
  return running_sum(counts);
}

void fill_pairs(const Pack& pack, Tensor& starts, Tensor& teacher, Tensor& student) {
  if (teacher.numel() == 0) return;
  launch(muse_fast::match_kernel<true>, pack.num_segments(), current_stream(starts), pack,
         starts.mutable_data_ptr<int64_t>(), teacher.mutable_data_ptr<int64_t>(), student.mutable_data_ptr<int64_t>(),
         teacher.numel());
}

// index [N] int32, offsets [V * B + 1] int32 -> teacher [P] int64, student [P] int64. Synchronises once, to read P.
std::tuple<Tensor, Tensor> match_nuclei(const Tensor& index, const Tensor& offsets, int64_t num_rois,
                                        int64_t num_globals) {
  const Pack pack = make_pack(index, offsets, num_rois, num_globals);
  const DeviceGuard guard(index.get_device_index());
  Tensor starts = count_pairs(pack, index);
  Tensor last = torch::stable::narrow(starts, 0, pack.num_segments(), 1);
  const int64_t num_pairs = *to_host(last).const_data_ptr<int64_t>();
  if (num_pairs < 0) {
    const Tensor host_index = to_host(index), host_offsets = to_host(offsets);
    muse_fast::check_rows(host_index.const_data_ptr<int32_t>(), pack.num_rows,
                          host_offsets.const_data_ptr<int32_t>(), pack.num_images());
    STD_TORCH_CHECK(false, "match_nuclei: index or offsets changed while they were read");
  }
  Tensor teacher = torch::stable::new_empty(index, {num_pairs}, ScalarType::Long);
  Tensor student = torch::stable::new_empty(index, {num_pairs}, ScalarType::Long);
  fill_pairs(pack, starts, teacher, student);
  return {teacher, student};
}

// ... -> teacher [capacity] int64, student [capacity] int64, count [] int64, negative if the pack is invalid. Does not
// synchronise.
std::tuple<Tensor, Tensor, Tensor> match_nuclei_padded(const Tensor& index, const Tensor& offsets, int64_t num_rois,
                                                       int64_t num_globals, int64_t capacity) {
  muse_fast::check_capacity(capacity);
  const Pack pack = make_pack(index, offsets, num_rois, num_globals);
  const DeviceGuard guard(index.get_device_index());
  Tensor starts = count_pairs(pack, index);
  Tensor teacher = torch::stable::new_empty(index, {capacity}, ScalarType::Long);
  Tensor student = torch::stable::new_empty(index, {capacity}, ScalarType::Long);
  for (Tensor* rows : {&teacher, &student}) torch::stable::fill_(*rows, muse_fast::kNone);
  fill_pairs(pack, starts, teacher, student);
  return {teacher, student, torch::stable::select(starts, 0, pack.num_segments())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(muse_fast, CUDA, library) {
  library.impl("match_nuclei", TORCH_BOX(&match_nuclei));
  library.impl("match_nuclei_padded", TORCH_BOX(&match_nuclei_padded));
}
