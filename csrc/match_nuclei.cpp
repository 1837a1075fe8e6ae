// Rows of the same nucleus in two views of a ROI: one merge of two sorted lists per (global g, view v != g, ROI b).
// Single-threaded: the batch of a rank takes a fraction of a millisecond, and a data worker has one core.
#include "match_nuclei.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <tuple>
#include <utility>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace muse_fast {

int64_t check_match_nuclei(const Tensor& index, const Tensor& offsets, int64_t num_rois, int64_t num_globals) {
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Int && index.dim() == 1 && index.is_contiguous(),
                  "match_nuclei: index must be contiguous 1-D int32");
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Int && offsets.dim() == 1 && offsets.is_contiguous(),
                  "match_nuclei: offsets must be contiguous 1-D int32");
  const int64_t num_images = offsets.numel() - 1;
  STD_TORCH_CHECK(num_rois > 0 && num_images >= 0 && num_images % num_rois == 0,
                  "match_nuclei: offsets must hold V * ", num_rois, " ROIs + 1 entries, got ", offsets.numel());
  const int64_t num_views = num_images / num_rois;
  STD_TORCH_CHECK(num_globals >= 1 && num_globals <= num_views, "match_nuclei: num_globals must be in 1..", num_views,
                  ", got ", num_globals);
  return num_views;
}

void check_rows(const int32_t* index, int64_t num_rows, const int32_t* offsets, int64_t num_images) {
  STD_TORCH_CHECK(offsets[0] == 0 && offsets[num_images] == num_rows,
                  "match_nuclei: offsets must rise from 0 to N = ", num_rows, ", got ", offsets[0], " to ",
                  offsets[num_images]);
  for (int64_t image = 0; image < num_images; ++image) {
    STD_TORCH_CHECK(offsets[image] <= offsets[image + 1] && offsets[image + 1] <= num_rows,
                    "match_nuclei: offsets must rise from 0 to N = ", num_rows, ", but image ", image, " has ",
                    offsets[image], " to ", offsets[image + 1]);
    for (int64_t row = offsets[image] + 1; row < offsets[image + 1]; ++row) {
      STD_TORCH_CHECK(index[row - 1] < index[row],
                      "match_nuclei: the rows of an image must be sorted by nucleus index, each index once; row ", row,
                      " of image ", image, " has ", index[row], " after ", index[row - 1]);
    }
  }
}

void check_capacity(int64_t capacity) {
  STD_TORCH_CHECK(capacity >= 0, "match_nuclei: capacity must not be negative, got ", capacity);
}

}  // namespace muse_fast

namespace {

struct Pair {
  int32_t teacher, student;
};

struct Pairs {
  std::unique_ptr<Pair[]> begin;
  int64_t count;
};

// Writes the rows of every index in both sorted ranges, starting at `pair`, and returns the end. The processor cannot
// predict which range has the smaller index next, so no step branches on it: each step writes a pair, and the end
// advances only if the indices are equal.
Pair* intersect(const int32_t* index, int64_t a, int64_t a_end, int64_t b, int64_t b_end, Pair* pair) {
  while (a < a_end && b < b_end) {
    const int32_t in_a = index[a], in_b = index[b];
    *pair = {static_cast<int32_t>(a), static_cast<int32_t>(b)};
    pair += in_a == in_b;
    a += in_a <= in_b;
    b += in_b <= in_a;
  }
  return pair;
}

Pairs find_pairs(const Tensor& index, const Tensor& offsets, int64_t num_rois, int64_t num_globals) {
  const int64_t num_views = muse_fast::check_match_nuclei(index, offsets, num_rois, num_globals);
  const int32_t* ids = index.const_data_ptr<int32_t>();
  const int32_t* rows = offsets.const_data_ptr<int32_t>();
  muse_fast::check_rows(ids, index.numel(), rows, num_views * num_rois);

  // A row is the student of each global at most once; one more for the last write of intersect.
  auto begin = std::make_unique_for_overwrite<Pair[]>(num_globals * index.numel() + 1);
  Pair* end = begin.get();
  for (int64_t g = 0; g < num_globals; ++g) {
    for (int64_t v = 0; v < num_views; ++v) {
      if (v == g) continue;
      const int32_t *of_teacher = rows + g * num_rois, *of_student = rows + v * num_rois;
      for (int64_t b = 0; b < num_rois; ++b) {
        end = intersect(ids, of_teacher[b], of_teacher[b + 1], of_student[b], of_student[b + 1], end);
      }
    }
  }
  const int64_t count = end - begin.get();
  return {std::move(begin), count};
}

// One side of the pairs, truncated or padded with -1 to `capacity` rows.
Tensor rows_of(int32_t Pair::* side, const Pairs& pairs, int64_t capacity, const Tensor& like) {
  Tensor tensor = torch::stable::new_empty(like, {capacity}, ScalarType::Long);
  int64_t* rows = tensor.mutable_data_ptr<int64_t>();
  const int64_t kept = std::min(pairs.count, capacity);
  for (int64_t pair = 0; pair < kept; ++pair) rows[pair] = pairs.begin[pair].*side;
  std::fill(rows + kept, rows + capacity, -1);
  return tensor;
}

// index [N] int32, offsets [V * B + 1] int32 -> teacher [P] int64, student [P] int64.
std::tuple<Tensor, Tensor> match_nuclei(const Tensor& index, const Tensor& offsets, int64_t num_rois,
                                        int64_t num_globals) {
  const Pairs pairs = find_pairs(index, offsets, num_rois, num_globals);
  return {rows_of(&Pair::teacher, pairs, pairs.count, index), rows_of(&Pair::student, pairs, pairs.count, index)};
}

// ... -> teacher [capacity] int64, student [capacity] int64, count [] int64.
std::tuple<Tensor, Tensor, Tensor> match_nuclei_padded(const Tensor& index, const Tensor& offsets, int64_t num_rois,
                                                       int64_t num_globals, int64_t capacity) {
  muse_fast::check_capacity(capacity);
  const Pairs pairs = find_pairs(index, offsets, num_rois, num_globals);
  Tensor count = torch::stable::new_empty(index, {}, ScalarType::Long);
  *count.mutable_data_ptr<int64_t>() = pairs.count;
  return {rows_of(&Pair::teacher, pairs, capacity, index), rows_of(&Pair::student, pairs, capacity, index), count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(muse_fast, CPU, library) {
  library.impl("match_nuclei", TORCH_BOX(&match_nuclei));
  library.impl("match_nuclei_padded", TORCH_BOX(&match_nuclei_padded));
}
