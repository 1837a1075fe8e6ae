// Every schema of the library. Each source registers its own implementation; Python adds the fakes (muse_fast/ops).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(muse_fast, library) {
  library.def(
      "match_nuclei(Tensor index, Tensor offsets, int num_rois, int num_globals) -> (Tensor teacher, Tensor student)");
}
