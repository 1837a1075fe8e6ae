// Input checks shared by the CPU and the CUDA implementation of match_nuclei (defined in match_nuclei.cpp).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace muse_fast {

// Checks types, shapes and counts: everything that does not require reading the rows. Returns the number of views V.
int64_t check_match_nuclei(const torch::stable::Tensor& index, const torch::stable::Tensor& offsets, int64_t num_rois,
                           int64_t num_globals);

// Checks that offsets rise from 0 to N, and that indices are sorted and unique in every image. Takes host pointers.
void check_rows(const int32_t* index, int64_t num_rows, const int32_t* offsets, int64_t num_images);

void check_capacity(int64_t capacity);

}  // namespace muse_fast
