// What the CPU and the CUDA implementation of match_nuclei ask of their inputs (match_nuclei.cpp).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace muse_fast {

// Types, shapes and counts: everything that can be checked without reading the rows. Returns the number of views V.
int64_t check_match_nuclei(const torch::stable::Tensor& index, const torch::stable::Tensor& offsets, int64_t num_rois,
                           int64_t num_globals);

// Offsets that rise from 0 to N, and sorted, unique indices in every image. Both pointers are the host's.
void check_rows(const int32_t* index, int64_t num_rows, const int32_t* offsets, int64_t num_images);

void check_capacity(int64_t capacity);

}  // namespace muse_fast
