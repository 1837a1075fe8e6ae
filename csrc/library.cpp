// All schemas of the library. Each source registers its own implementation; Python adds the fakes (muse_fast/ops).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(muse_fast, library) {
  library.def(
      "match_nuclei(Tensor index, Tensor offsets, int num_rois, int num_globals) -> (Tensor teacher, Tensor student)");
  library.def(
      "match_nuclei_padded(Tensor index, Tensor offsets, int num_rois, int num_globals, SymInt capacity) -> "
      "(Tensor teacher, Tensor student, Tensor count)");
  library.def("sample_nuclei_fwd(Tensor[] levels, Tensor xy, Tensor image_index, SymInt view_size) -> Tensor");
  library.def(
      "sample_nuclei_bwd(Tensor gradient, Tensor xy, Tensor image_index, SymInt view_size, SymInt num_images, "
      "SymInt[] shapes, bool channels_last) -> Tensor[]");
  library.def(
      "dino_loss_fwd(Tensor student_logits, Tensor teacher_logits, Tensor center, Tensor teacher_rows, "
      "Tensor student_rows, float student_temp, float teacher_temp) -> "
      "(Tensor loss, Tensor student_stats, Tensor teacher_stats)");
  library.def(
      "dino_loss_bwd(Tensor loss_gradient, Tensor student_logits, Tensor teacher_logits, Tensor center, "
      "Tensor student_stats, Tensor teacher_stats, Tensor teacher_rows, Tensor student_rows, float student_temp, "
      "float teacher_temp) -> Tensor");
}
