// DINO's cross-entropy over pairs of rows, from stored logits, without a stored softmax, and its gradient.
//
// With m the largest entry of a row and Z the sum of its exponentials after subtracting m,
//
//   p_jk = exp((t_jk - c_k - m_j) / tt) / Z_j        the teacher, centred and sharpened
//   q_ik = exp((x_ik - m_i) / ts) / Z_i              the student
//
//   loss_p         = -sum_k p_jk log q_ik = log Z_i - sum_k p_jk (x_ik - m_i) / ts
//   d loss / d x_i = sum_{p of row i} g_p (q_i - p_j) / ts            (j, i) = (teacher_rows[p], student_rows[p])
//
// Rows are processed in blocks of columns that fit in the L1 cache, all rows of a block before the next block: a row in
// many pairs is read from memory once, then from a cache. The result of a block does not depend on other blocks, and
// blocks are added up in order: the result is bit-identical for any number of threads.
#include "vector_math.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 2048;              // columns
constexpr int64_t kColumnsPerThread = 32768;  // over all rows; fewer are not worth a thread

struct Columns {
  int64_t start, size;
};

// A tensor as contiguous T, a float or a struct of floats.
template <typename T>
class Values {
 public:
  explicit Values(const Tensor& tensor)
      : tensor_(torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float))),
        data_(static_cast<const T*>(tensor_.const_data_ptr())) {}
  const T& operator[](int64_t place) const { return data_[place]; }

 private:
  Tensor tensor_;
  const T* data_;
};

// --- loops that vectorise: each captures by value, so that the compiler can rule out aliasing

// sum_k term(k). Adding to a large float rounds off much of each term, so every run of terms starts from 0 again.
template <typename Term>
float sum(int64_t size, const Term& term) {
  constexpr int64_t kRun = 256;
  double total = 0;
  for (int64_t start = 0; start < size; start += kRun) {
    const int64_t end = std::min(start + kRun, size);
    float run = 0;
#pragma omp simd reduction(+ : run)
    for (int64_t k = start; k < end; ++k) run += term(k);
    total += run;
  }
  return static_cast<float>(total);
}

float largest(const float* x, int64_t size) {
  float peak = std::numeric_limits<float>::lowest();  // not -inf: a whole block of prototypes may be -inf
#pragma omp simd reduction(max : peak)
  for (int64_t k = 0; k < size; ++k) peak = x[k] > peak ? x[k] : peak;
  return peak;
}

// x = exp((x - peak) / temp); returns the sum.
float exponentiate(float* x, int64_t size, float peak, float inverse_temp) {
  return sum(size, [=](int64_t k) { return x[k] = muse_fast::exp((x[k] - peak) * inverse_temp); });
}

// sum_k weights_k (x_k - peak).
float score(const float* weights, const float* x, int64_t size, float peak) {
  return sum(size, [=](int64_t k) { return weights[k] * (x[k] - peak); });
}

// out += scale exp((x - peak) / temp).
void add_exponentials(float* __restrict out, const float* __restrict x, int64_t size, float peak, float inverse_temp,
                      float scale) {
#pragma omp simd
  for (int64_t k = 0; k < size; ++k) out[k] += scale * muse_fast::exp((x[k] - peak) * inverse_temp);
}

void subtract(float* __restrict x, const float* __restrict y, int64_t size) {
#pragma omp simd
  for (int64_t k = 0; k < size; ++k) x[k] -= y[k];
}

template <typename From, typename To>
void convert(const From* __restrict from, int64_t size, To* __restrict to) {
  for (int64_t k = 0; k < size; ++k) to[k] = static_cast<To>(from[k]);
}

// --- inputs

// Calls the function with a null pointer to the type of the logits.
template <typename Function>
void with_type(ScalarType dtype, const Function& function) {
  if (dtype == ScalarType::Float) return function(static_cast<float*>(nullptr));
  if (dtype == ScalarType::BFloat16) return function(static_cast<BFloat16*>(nullptr));
  function(static_cast<Half*>(nullptr));
}

// Logits [N, K], read as floats.
class Logits {
 public:
  Logits(const char* name, const Tensor& logits, const Tensor& center) {
    STD_TORCH_CHECK(logits.dim() == 2 && center.dim() == 1 && logits.size(1) == center.size(0) && center.size(0) > 0,
                    "dino_loss: expected ", name, " [N, K] and center [K], K above 0");
    dtype_ = logits.scalar_type();
    STD_TORCH_CHECK(dtype_ == ScalarType::Float || dtype_ == ScalarType::BFloat16 || dtype_ == ScalarType::Half,
                    "dino_loss: ", name, " must be float32, bfloat16 or float16");
    logits_ = logits.stride(1) == 1 ? logits : torch::stable::contiguous(logits);
    data_ = logits_.const_data_ptr();
    row_stride_ = logits_.stride(0);
  }

  ScalarType dtype() const { return dtype_; }
  int64_t num_rows() const { return logits_.size(0); }
  int64_t num_columns() const { return logits_.size(1); }

  void load(int64_t row, Columns columns, float* out) const {
    with_type(dtype_, [&]<typename T>(T*) {
      convert(static_cast<const T*>(data_) + row * row_stride_ + columns.start, columns.size, out);
    });
  }

 private:
  Tensor logits_;
  ScalarType dtype_;
  const void* data_;
  int64_t row_stride_;
};

// (teacher_rows[p], student_rows[p]) of every pair p. A negative row marks padding.
class Pairs {
 public:
  Pairs(const Tensor& teacher_rows, const Tensor& student_rows, int64_t num_teachers, int64_t num_students)
      : teacher_rows_(rows("teacher", teacher_rows, num_teachers)),
        student_rows_(rows("student", student_rows, num_students)) {
    STD_TORCH_CHECK(teacher_rows.numel() == student_rows.numel(), "dino_loss: expected as many teacher_rows as ",
                    "student_rows, got ", teacher_rows.numel(), " and ", student_rows.numel());
    teacher = teacher_rows_.const_data_ptr<int64_t>();
    student = student_rows_.const_data_ptr<int64_t>();
    size = teacher_rows.numel();
  }

  bool is_padding(int64_t pair) const { return teacher[pair] < 0 || student[pair] < 0; }

  const int64_t *teacher, *student;
  int64_t size;

 private:
  static Tensor rows(const char* who, const Tensor& rows, int64_t num_rows) {
    STD_TORCH_CHECK(rows.dim() == 1 && rows.scalar_type() == ScalarType::Long, "dino_loss: ", who,
                    "_rows must be 1-D int64");
    const Tensor contiguous = torch::stable::contiguous(rows);
    const std::span all(contiguous.const_data_ptr<int64_t>(), static_cast<size_t>(rows.numel()));
    for (const int64_t row : all) {
      STD_TORCH_CHECK(row < num_rows, "dino_loss: ", who, "_rows must be below ", num_rows, ", the number of ", who,
                      " rows, got ", row);
    }
    return contiguous;
  }

  Tensor teacher_rows_, student_rows_;
};

// The pairs of every row, in their given order, without padding.
class PairsOfRows {
 public:
  PairsOfRows(const Pairs& pairs, const int64_t* rows, int64_t num_rows) : first_(num_rows + 1) {
    for (int64_t p = 0; p < pairs.size; ++p) {
      if (!pairs.is_padding(p)) ++first_[rows[p] + 1];
    }
    std::partial_sum(first_.begin(), first_.end(), first_.begin());
    pairs_.resize(first_.back());
    std::vector<int64_t> next(first_);
    for (int64_t p = 0; p < pairs.size; ++p) {
      if (!pairs.is_padding(p)) pairs_[next[rows[p]]++] = p;
    }
  }

  std::span<const int64_t> operator[](int64_t row) const {
    return {pairs_.data() + first_[row], pairs_.data() + first_[row + 1]};
  }

 private:
  std::vector<int64_t> first_, pairs_;  // a row has pairs_[first_[row]] to pairs_[first_[row + 1] - 1]
};

int64_t count_blocks(int64_t num_columns) { return (num_columns + kBlock - 1) / kBlock; }

// Calls work(row, block, columns) for every row of every block.
template <typename Work>
void for_each_block(int64_t num_rows, int64_t num_columns, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, kColumnsPerThread / std::min(num_columns, kBlock));
  torch::stable::parallel_for(0, num_rows * count_blocks(num_columns), grain, [&](int64_t begin, int64_t end) {
    muse_fast::vectorised([&] {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t block = item / num_rows, start = block * kBlock;
        work(item % num_rows, block, Columns{start, std::min(kBlock, num_columns - start)});
      }
    });
  });
}

// --- the ops

// Sums of a pair over a block of columns; x are the student logits, u the teacher logits minus the centre.
struct Sums {
  float student_peak, student_total;  // max x, sum exp((x - max x) / ts)
  float teacher_peak, teacher_total;  // max u, sum exp((u - max u) / tt)
  float product;                      // sum exp((u - max u) / tt) (x - max x)
};

// m and Z of a row, as the two columns of its stats.
struct Stats {
  float peak, total;
};

struct Result {
  float loss;
  Stats student, teacher;
};

Result add_up(std::span<const Sums> blocks, float inverse_student_temp, float inverse_teacher_temp) {
  float student_peak = blocks[0].student_peak, teacher_peak = blocks[0].teacher_peak;
  for (const Sums& block : blocks) {
    student_peak = std::max(student_peak, block.student_peak);
    teacher_peak = std::max(teacher_peak, block.teacher_peak);
  }
  double student_total = 0, teacher_total = 0, product = 0;
  for (const Sums& block : blocks) {
    const float below = block.student_peak - student_peak;
    const double share = muse_fast::exp((block.teacher_peak - teacher_peak) * inverse_teacher_temp);
    student_total += double{block.student_total} * muse_fast::exp(below * inverse_student_temp);
    teacher_total += share * block.teacher_total;
    product += share * (block.product + double{block.teacher_total} * below);
  }
  const double loss = std::log(student_total) - product / teacher_total * inverse_student_temp;
  return {static_cast<float>(loss),
          {student_peak, static_cast<float>(student_total)},
          {teacher_peak, static_cast<float>(teacher_total)}};
}

// -> loss [P]; m and Z of every row in a pair [Ns, 2], [Nt, 2], zeros elsewhere; all float32.
std::tuple<Tensor, Tensor, Tensor> dino_loss_fwd(const Tensor& student_logits, const Tensor& teacher_logits,
                                                 const Tensor& center, const Tensor& teacher_rows,
                                                 const Tensor& student_rows, double student_temp,
                                                 double teacher_temp) {
  const Logits student("student_logits", student_logits, center), teacher("teacher_logits", teacher_logits, center);
  const Pairs pairs(teacher_rows, student_rows, teacher.num_rows(), student.num_rows());
  const PairsOfRows of_teacher(pairs, pairs.teacher, teacher.num_rows());
  const Values<float> centers(center);
  const float inverse_student_temp = 1 / student_temp, inverse_teacher_temp = 1 / teacher_temp;

  const int64_t num_columns = student.num_columns(), num_blocks = count_blocks(num_columns);
  std::vector<Sums> sums(pairs.size * num_blocks);
  for_each_block(teacher.num_rows(), num_columns, [&](int64_t j, int64_t block, Columns columns) {
    if (of_teacher[j].empty()) return;
    alignas(64) float u[kBlock], x[kBlock];
    teacher.load(j, columns, u);
    subtract(u, &centers[columns.start], columns.size);
    const float teacher_peak = largest(u, columns.size);
    const float teacher_total = exponentiate(u, columns.size, teacher_peak, inverse_teacher_temp);
    for (const int64_t p : of_teacher[j]) {
      student.load(pairs.student[p], columns, x);
      const float student_peak = largest(x, columns.size);
      const float product = score(u, x, columns.size, student_peak);
      const float student_total = exponentiate(x, columns.size, student_peak, inverse_student_temp);
      sums[p * num_blocks + block] = {student_peak, student_total, teacher_peak, teacher_total, product};
    }
  });

  Tensor loss = torch::stable::new_zeros(center, {pairs.size}, ScalarType::Float);
  Tensor student_stats = torch::stable::new_zeros(center, {student.num_rows(), 2}, ScalarType::Float);
  Tensor teacher_stats = torch::stable::new_zeros(center, {teacher.num_rows(), 2}, ScalarType::Float);
  float* losses = loss.mutable_data_ptr<float>();
  auto* of_students = static_cast<Stats*>(student_stats.mutable_data_ptr());
  auto* of_teachers = static_cast<Stats*>(teacher_stats.mutable_data_ptr());
  for (int64_t p = 0; p < pairs.size; ++p) {
    if (pairs.is_padding(p)) continue;
    const std::span blocks(sums.data() + p * num_blocks, static_cast<size_t>(num_blocks));
    const Result result = add_up(blocks, inverse_student_temp, inverse_teacher_temp);
    losses[p] = result.loss;
    of_students[pairs.student[p]] = result.student;  // the same from every pair of the row
    of_teachers[pairs.teacher[p]] = result.teacher;
  }
  return {loss, student_stats, teacher_stats};
}

// -> the gradient of the student logits [Ns, K], contiguous, in their dtype.
Tensor dino_loss_bwd(const Tensor& loss_gradient, const Tensor& student_logits, const Tensor& teacher_logits,
                     const Tensor& center, const Tensor& student_stats, const Tensor& teacher_stats,
                     const Tensor& teacher_rows, const Tensor& student_rows, double student_temp,
                     double teacher_temp) {
  const Logits student("student_logits", student_logits, center), teacher("teacher_logits", teacher_logits, center);
  const Pairs pairs(teacher_rows, student_rows, teacher.num_rows(), student.num_rows());
  const PairsOfRows of_student(pairs, pairs.student, student.num_rows());
  STD_TORCH_CHECK(loss_gradient.numel() == pairs.size && student_stats.numel() == 2 * student.num_rows() &&
                      teacher_stats.numel() == 2 * teacher.num_rows(),
                  "dino_loss: expected loss_gradient [P], student_stats [Ns, 2], teacher_stats [Nt, 2]");
  const Values<float> centers(center), weights(loss_gradient);
  const Values<Stats> of_students(student_stats), of_teachers(teacher_stats);
  const float inverse_student_temp = 1 / student_temp, inverse_teacher_temp = 1 / teacher_temp;

  const int64_t num_columns = student.num_columns();
  Tensor gradient = torch::stable::new_empty(student_logits, {student.num_rows(), num_columns});
  void* out = gradient.mutable_data_ptr();
  for_each_block(student.num_rows(), num_columns, [&](int64_t i, int64_t, Columns columns) {
    alignas(64) float result[kBlock], x[kBlock];
    std::fill_n(result, columns.size, 0.0f);
    float weight = 0;
    for (const int64_t p : of_student[i]) {
      const auto [peak, total] = of_teachers[pairs.teacher[p]];
      teacher.load(pairs.teacher[p], columns, x);
      subtract(x, &centers[columns.start], columns.size);
      add_exponentials(result, x, columns.size, peak, inverse_teacher_temp, -weights[p] * inverse_student_temp / total);
      weight += weights[p];
    }
    if (!of_student[i].empty()) {
      const auto [peak, total] = of_students[i];
      student.load(i, columns, x);
      add_exponentials(result, x, columns.size, peak, inverse_student_temp, weight * inverse_student_temp / total);
    }
    with_type(student.dtype(), [&]<typename T>(T*) {
      convert(result, columns.size, static_cast<T*>(out) + i * num_columns + columns.start);
    });
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(muse_fast, CPU, library) {
  library.impl("dino_loss_fwd", TORCH_BOX(&dino_loss_fwd));
  library.impl("dino_loss_bwd", TORCH_BOX(&dino_loss_bwd));
}
