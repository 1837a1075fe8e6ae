// Matching and sampling in one cooperative launch: no wait of the host, no atomics, the same bits in every run.
//
// A block owns a contiguous chunk of the packed rows, and marks every row with what it is: in column g < G the row of
// global g that shows the same nucleus, if any; in columns G and G + 1 whether it stands in a pair as teacher and as
// student. The marks of a column, counted over the blocks and ranked within them, give each marked row its place:
//
//   mark and count | grid barrier | slots of teacher and student rows | grid barrier | pairs; sample the rows
//
// Pairs come out in the order of match_nuclei, for packed order is by view, then ROI, then index.
#pragma once

#include "pack.cuh"

#include <cstdint>

namespace muse_fast {

constexpr int kMaxLevels = 4;

template <typename T>
struct Level {
  const T* values;  // [images, channels, height, width]
  int64_t image_stride, channel_stride, row_stride, column_stride;
  int channels, height, width;
};

// The maps of the images of one resolution.
template <typename T>
struct Maps {
  Level<T> levels[kMaxLevels];
  int num_levels, view_size;
};

// What becomes of the rows of the teacher, or of the student.
template <typename T>
struct Side {
  Maps<T> globals, locals;  // the teacher has no locals
  int64_t capacity;         // C
  int64_t width;            // D
  int64_t* kept;            // [C] packed rows, then kNone
  T* rows;                  // [C, D]
};

template <typename T>
struct NuloRows {
  Pack pack;
  const float* xy;  // [N, 2]
  Side<T> teacher, student;
  int64_t pair_capacity;
  int64_t *teacher_rows, *student_rows;  // [pair_capacity]
  int64_t* counts;                       // [3] teacher rows, student rows, pairs; -1 if the pack is broken
  int32_t* marks;                        // [G + 2, N]
  int32_t* block_counts;                 // [G + 3, blocks]: of the marks, then of the faults

  __device__ int64_t num_columns() const { return pack.num_globals + 2; }
  __device__ int32_t* column(int64_t number) const { return marks + number * pack.num_rows; }
};

// The image of a row: the last that starts at or before it.
__device__ inline int64_t image_of(const Pack& pack, int64_t row) {
  int64_t image = 0, end = pack.num_images();
  while (image + 1 < end) {
    const int64_t middle = (image + end) / 2;
    if (pack.offsets[middle] <= row) {
      image = middle;
    } else {
      end = middle;
    }
  }
  return image;
}

template <typename T>
__device__ void mark(const NuloRows<T>& args, int64_t row) {
  const Pack& pack = args.pack;
  const int64_t image = image_of(pack, row), view = image / pack.num_rois, roi = image % pack.num_rois;
  int64_t as_teacher = kNone, as_student = kNone;
  for (int64_t other = 0; other < pack.num_views; ++other) {
    const bool is_global = other < pack.num_globals;
    if (!is_global && (view >= pack.num_globals || as_teacher != kNone)) break;
    const Rows rows = pack.rows(other * pack.num_rois + roi);
    const int64_t match = other == view ? kNone : find(pack.index, rows, pack.index[row]);
    if (is_global) args.column(other)[row] = match;
    if (match == kNone) continue;
    if (is_global) as_student = 0;
    if (view < pack.num_globals) as_teacher = 0;
  }
  args.column(pack.num_globals)[row] = as_teacher;
  args.column(pack.num_globals + 1)[row] = as_student;
}

// The rows that this block owns.
__device__ inline Rows chunk(const Pack& pack) {
  const int64_t size = (pack.num_rows + gridDim.x - 1) / gridDim.x;
  const int64_t begin = min(blockIdx.x * size, pack.num_rows);
  return {begin, min(begin + size, pack.num_rows)};
}

template <typename T>
__device__ void publish(const NuloRows<T>& args, int64_t number, int count) {
  const int total = block_prefix(count).total;
  if (threadIdx.x == 0) args.block_counts[number * gridDim.x + blockIdx.x] = total;
}

// A thread marks the rows that it ranks in for_each_marked.
template <typename T>
__device__ void mark_and_count(const NuloRows<T>& args) {
  const Rows mine = chunk(args.pack);
  for (int64_t row = mine.begin + threadIdx.x; row < mine.end; row += blockDim.x) mark(args, row);
  for (int64_t number = 0; number < args.num_columns(); ++number) {
    int count = 0;
    for (int64_t row = mine.begin + threadIdx.x; row < mine.end; row += blockDim.x) {
      count += args.column(number)[row] != kNone;
    }
    publish(args, number, count);
  }
  publish(args, args.num_columns(), count_faults(args.pack));
}

// What the blocks before this one counted in a column, and all of them.
template <typename T>
__device__ Prefix grid_prefix(const NuloRows<T>& args, int64_t number) {
  Prefix sums{0, 0};
  for (int block = threadIdx.x; block < static_cast<int>(gridDim.x); block += blockDim.x) {
    const int count = args.block_counts[number * gridDim.x + block];
    if (block < static_cast<int>(blockIdx.x)) sums.before += count;
    sums.total += count;
  }
  return {block_prefix(sums.before).total, block_prefix(sums.total).total};
}

// Calls visit(row, place) for the rows of this block that are marked in a column, place being how many of the pack are
// marked before. Returns how many of the pack are.
template <typename T, typename Visit>
__device__ int64_t for_each_marked(const NuloRows<T>& args, int64_t number, Visit visit) {
  const Prefix marked = grid_prefix(args, number);
  const Rows mine = chunk(args.pack);
  int64_t place = marked.before;
  for (int64_t tile = mine.begin; tile < mine.end; tile += blockDim.x) {
    const int64_t row = tile + threadIdx.x;
    const bool is_marked = row < mine.end && args.column(number)[row] != kNone;
    const Prefix rank = block_prefix(is_marked);
    if (is_marked) visit(row, place + rank.before);
    place += rank.total;
  }
  return marked.total;
}

// Turns the marks of a side into slots; rows beyond its capacity lose theirs.
template <typename T>
__device__ int64_t assign_slots(const NuloRows<T>& args, const Side<T>& side, int64_t number) {
  return for_each_marked(args, number, [&](int64_t row, int64_t slot) {
    const bool fits = slot < side.capacity;
    args.column(number)[row] = fits ? slot : kNone;
    if (fits) side.kept[slot] = row;
  });
}

// Writes the pairs; those of a row without a slot are kNone. Returns how many there are.
template <typename T>
__device__ int64_t write_pairs(const NuloRows<T>& args) {
  const int64_t num_globals = args.pack.num_globals;
  const int32_t *teacher_slots = args.column(num_globals), *student_slots = args.column(num_globals + 1);
  int64_t num_pairs = 0;
  for (int64_t g = 0; g < num_globals; ++g) {
    const int64_t more = for_each_marked(args, g, [&](int64_t row, int64_t place) {
      const int64_t pair = num_pairs + place;
      if (pair >= args.pair_capacity) return;
      const int32_t teacher = teacher_slots[args.column(g)[row]], student = student_slots[row];
      const bool complete = teacher != kNone && student != kNone;
      args.teacher_rows[pair] = complete ? teacher : kNone;
      args.student_rows[pair] = complete ? student : kNone;
    });
    num_pairs += more;
  }
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t pair = num_pairs + thread; pair < args.pair_capacity; pair += threads) {
    args.teacher_rows[pair] = args.student_rows[pair] = kNone;
  }
  return num_pairs;
}

// The weights of the pixels first, first + 1 and first + 2 along one axis of a level.
struct Taps {
  int first;
  float weights[3];
};

// Of a point between two neighbouring pixels of the finest level, which has `fine`. Each of them lies, corners aligned,
// between two of the level's `coarse` <= fine pixels. Those beyond the border have weight 0.
__device__ inline Taps taps(double position, int fine, int coarse) {
  const unsigned left = static_cast<unsigned>(position), steps = max(fine - 1, 1);
  // In steps of 1 / steps of the level's pixels, for exactness: the left pixel, and how far both lie beyond `first`.
  const unsigned place = left * (coarse - 1), left_beyond = place % steps, right_beyond = left_beyond + coarse - 1;
  const bool crosses = right_beyond >= steps;  // then the right one lies between first + 1 and first + 2
  const float share = static_cast<float>(position - left);  // of the right one
  const float left_share = static_cast<float>(left_beyond) / steps;
  const float right_share = static_cast<float>(crosses ? right_beyond - steps : right_beyond) / steps;
  const float near = share * (1 - right_share), far = share * right_share;
  return {static_cast<int>(place / steps),
          {(1 - share) * (1 - left_share) + (crosses ? 0 : near), (1 - share) * left_share + (crosses ? near : far),
           crosses ? far : 0}};
}

// A warp reads the row of a nucleus, a lane every 32nd channel: bilinear(cat(upsample(levels)), xy).
template <typename T>
__device__ void sample(const Maps<T>& maps, int64_t image, float x, float y, T* row) {
  const int height = maps.levels[0].height, width = maps.levels[0].width;
  const double u = fmin(fmax(double{x} / maps.view_size * (width - 1), 0.0), width - 1.0);
  const double v = fmin(fmax(double{y} / maps.view_size * (height - 1), 0.0), height - 1.0);
  for (int number = 0; number < maps.num_levels; ++number) {
    const Level<T>& level = maps.levels[number];
    const Taps columns = taps(u, width, level.width), rows = taps(v, height, level.height);
    const T* corner = level.values + image * level.image_stride + rows.first * level.row_stride +
                      columns.first * level.column_stride;
    for (int channel = threadIdx.x % 32; channel < level.channels; channel += 32) {
      float sum = 0;
      for (int down = 0; down < 3; ++down) {
        for (int right = 0; right < 3; ++right) {
          const float weight = rows.weights[down] * columns.weights[right];
          if (weight == 0) continue;  // may lie beyond the border
          const T* pixel = corner + down * level.row_stride + right * level.column_stride;
          sum += weight * static_cast<float>(pixel[channel * level.channel_stride]);
        }
      }
      row[channel] = static_cast<T>(sum);
    }
    row += level.channels;
  }
}

// A warp takes a slot at a time; those beyond `count` become zeros.
template <typename T>
__device__ void sample_side(const NuloRows<T>& args, const Side<T>& side, int64_t count) {
  const Pack& pack = args.pack;
  const int64_t num_globals = pack.num_globals * pack.num_rois;
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / 32);
  for (int64_t slot = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32; slot < side.capacity; slot += warps) {
    T* row = side.rows + slot * side.width;
    if (slot >= count) {
      for (int64_t channel = threadIdx.x % 32; channel < side.width; channel += 32) row[channel] = static_cast<T>(0.0f);
      if (threadIdx.x % 32 == 0) side.kept[slot] = kNone;
      continue;
    }
    const int64_t packed = side.kept[slot], image = image_of(pack, packed);
    const bool is_global = image < num_globals;
    const float x = args.xy[2 * packed], y = args.xy[2 * packed + 1];
    sample(is_global ? side.globals : side.locals, is_global ? image : image - num_globals, x, y, row);
  }
}

// Cooperative, with whole warps.
template <typename T>
__global__ void nulo_rows_kernel(const __grid_constant__ NuloRows<T> args) {
  const int64_t num_globals = args.pack.num_globals;
  mark_and_count(args);
  grid_sync();
  const int64_t teachers = assign_slots(args, args.teacher, num_globals);
  const int64_t students = assign_slots(args, args.student, num_globals + 1);
  const bool broken = grid_prefix(args, args.num_columns()).total > 0;
  grid_sync();
  const int64_t pairs = write_pairs(args);
  sample_side(args, args.teacher, teachers);
  sample_side(args, args.student, students);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    args.counts[0] = broken ? -1 : teachers;
    args.counts[1] = broken ? -1 : students;
    args.counts[2] = broken ? -1 : pairs;
  }
}

}  // namespace muse_fast
