// Rows of the same nucleus in two views of a ROI: one merge of two sorted lists per (global g, view v != g, ROI b).
// One thread: the batch of a rank takes a fraction of a millisecond, and a data worker owns one core.
#include "match_nuclei.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

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

}  // namespace muse_fast

namespace {

// Appends the rows of every id that both sorted ranges hold.
void intersect(const int32_t* ids, int64_t a, int64_t a_end, int64_t b, int64_t b_end, std::vector<int64_t>& a_rows,
               std::vector<int64_t>& b_rows) {
  while (a < a_end && b < b_end) {
    if (ids[a] < ids[b]) {
      ++a;
    } else if (ids[a] > ids[b]) {
      ++b;
    } else {
      a_rows.push_back(a++);
      b_rows.push_back(b++);
    }
  }
}

Tensor to_tensor(const std::vector<int64_t>& rows, const Tensor& like) {
  Tensor tensor = torch::stable::new_empty(like, {static_cast<int64_t>(rows.size())}, ScalarType::Long);
  std::copy(rows.begin(), rows.end(), tensor.mutable_data_ptr<int64_t>());
  return tensor;
}

// index [N] int32, offsets [V * B + 1] int32 -> teacher [P] int64, student [P] int64.
std::tuple<Tensor, Tensor> match_nuclei(const Tensor& index, const Tensor& offsets, int64_t num_rois,
                                        int64_t num_globals) {
  const int64_t num_views = muse_fast::check_match_nuclei(index, offsets, num_rois, num_globals);
  const int32_t* ids = index.const_data_ptr<int32_t>();
  const int32_t* rows = offsets.const_data_ptr<int32_t>();
  muse_fast::check_rows(ids, index.numel(), rows, num_views * num_rois);

  std::vector<int64_t> teacher, student;
  for (int64_t g = 0; g < num_globals; ++g) {
    for (int64_t v = 0; v < num_views; ++v) {
      if (v == g) continue;
      const int32_t *of_teacher = rows + g * num_rois, *of_student = rows + v * num_rois;
      for (int64_t b = 0; b < num_rois; ++b) {
        intersect(ids, of_teacher[b], of_teacher[b + 1], of_student[b], of_student[b + 1], teacher, student);
      }
    }
  }
  return {to_tensor(teacher, index), to_tensor(student, index)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(muse_fast, CPU, library) {
  library.impl("match_nuclei", TORCH_BOX(&match_nuclei));
}
