// From tensors on a CUDA device to what kernels take.
#pragma once

#include "match_nuclei.h"
#include "pack.cuh"

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace muse_fast {

inline Pack make_pack(const torch::stable::Tensor& index, const torch::stable::Tensor& offsets, int64_t num_rois,
                      int64_t num_globals) {
  const int64_t num_views = check_match_nuclei(index, offsets, num_rois, num_globals);
  STD_TORCH_CHECK(index.get_device_index() == offsets.get_device_index(), "match_nuclei: index is on device ",
                  index.get_device_index(), ", offsets on ", offsets.get_device_index());
  return {index.const_data_ptr<int32_t>(), offsets.const_data_ptr<int32_t>(), index.numel(), num_rois, num_views,
          num_globals};
}

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
  return static_cast<cudaStream_t>(current);
}

}  // namespace muse_fast
