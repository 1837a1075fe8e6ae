// Rows of the unified map at the nuclei, read directly from the levels without building the map, and their gradient.
//
// Upsampling and sampling are linear, axis by axis. A point at position u lies between the fine pixels q = floor(u) and
// q + 1, with weights 1 - s and s, where s = u - q. Upsampling puts fine pixel q at q (coarse - 1) / (fine - 1) of a
// level, between two of its pixels. So a point depends on at most four pixels of a level along an axis (three, if the
// level is coarser), and a tap's weight is the product of its weights along both axes.
//
// Forward: a thread owns rows. Backward: a thread owns the gradient of whole images and adds up their rows in order. So
// the result is bit-identical for any number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRowsPerThread = 16;  // fewer are not worth a thread
constexpr int64_t kMostPixels = 4;      // along one axis

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Points {
  Tensor xy, image_index;  // [N, 2] float64, [N] int64; contiguous
  const double* places;
  const int64_t* images;
  int64_t count, view_size;

  // Position of a point among `pixels` fine pixels along axis 0 (x) or 1 (y). NaN becomes 0.
  double position(int64_t point, int axis, int64_t pixels) const {
    const double last = static_cast<double>(pixels - 1);
    return std::min(std::max(0.0, places[point * 2 + axis] / static_cast<double>(view_size) * last), last);
  }
};

// A level, or the gradient of one, with any strides.
template <typename T>
struct Level {
  T* data;
  int64_t channels, height, width;
  int64_t image_stride, channel_stride, row_stride, column_stride;

  Level(T* data, const Tensor& tensor)
      : data(data), channels(tensor.size(1)), height(tensor.size(2)), width(tensor.size(3)),
        image_stride(tensor.stride(0)), channel_stride(tensor.stride(1)), row_stride(tensor.stride(2)),
        column_stride(tensor.stride(3)) {}
};

// The pixels of a level that a point depends on along one axis, and their weights.
struct Blend {
  int64_t count = 0;
  int64_t pixels[kMostPixels];
  double weights[kMostPixels];

  Blend(double u, int64_t fine, int64_t coarse) {
    const int64_t q = static_cast<int64_t>(u), span = std::max<int64_t>(fine - 1, 1);
    const double s = u - static_cast<double>(q);
    for (const auto& [pixel, weight] : {std::pair{q, 1 - s}, std::pair{q + 1, s}}) {
      const int64_t place = pixel * (coarse - 1);  // in units of 1 / span
      const double share = static_cast<double>(place % span) / static_cast<double>(span);
      add(place / span, weight * (1 - share));
      add(place / span + 1, weight * share);
    }
  }

 private:
  void add(int64_t pixel, double weight) {
    if (weight == 0) return;  // true of all pixels past the border
    const int64_t place = std::find(pixels, pixels + count, pixel) - pixels;
    if (place == count) {
      pixels[count] = pixel;
      weights[count++] = 0;
    }
    weights[place] += weight;
  }
};

// The pixels of a level that a point depends on, as offsets into an image, and their weights.
template <typename Weight>
struct Taps {
  int64_t count = 0;
  int64_t offsets[kMostPixels * kMostPixels];
  Weight weights[kMostPixels * kMostPixels];

  template <typename T>
  Taps(const Points& points, int64_t point, int64_t fine_height, int64_t fine_width, const Level<T>& level) {
    const Blend across(points.position(point, 0, fine_width), fine_width, level.width);
    const Blend down(points.position(point, 1, fine_height), fine_height, level.height);
    for (int64_t y = 0; y < down.count; ++y) {
      for (int64_t x = 0; x < across.count; ++x) {
        offsets[count] = down.pixels[y] * level.row_stride + across.pixels[x] * level.column_stride;
        weights[count++] = static_cast<Weight>(down.weights[y] * across.weights[x]);
      }
    }
  }
};

Points checked_points(const Tensor& xy, const Tensor& image_index, int64_t view_size, int64_t num_images) {
  STD_TORCH_CHECK(xy.dim() == 2 && xy.size(1) == 2, "sample_nuclei: xy must be [N, 2]");
  STD_TORCH_CHECK(image_index.scalar_type() == ScalarType::Long && image_index.dim() == 1 &&
                      image_index.size(0) == xy.size(0),
                  "sample_nuclei: image_index must be int64 [", xy.size(0), "]");
  STD_TORCH_CHECK(view_size > 0, "sample_nuclei: view_size must be positive, got ", view_size);
  Points points{torch::stable::contiguous(torch::stable::to(xy, ScalarType::Double)),
                torch::stable::contiguous(image_index),
                nullptr,
                nullptr,
                xy.size(0),
                view_size};
  points.places = points.xy.const_data_ptr<double>();
  points.images = points.image_index.const_data_ptr<int64_t>();
  for (int64_t point = 0; point < points.count; ++point) {
    STD_TORCH_CHECK(points.images[point] < num_images, "sample_nuclei: image_index must be below ", num_images,
                    ", the number of images, got ", points.images[point]);
  }
  return points;
}

template <typename T>
void sample(const std::vector<Tensor>& tensors, const Points& points, Tensor& of_rows) {
  std::vector<Level<const T>> levels;
  for (const Tensor& tensor : tensors) levels.emplace_back(static_cast<const T*>(tensor.const_data_ptr()), tensor);
  T* rows = static_cast<T*>(of_rows.mutable_data_ptr());
  const int64_t num_channels = of_rows.size(1);
  const int64_t height = levels[0].height, width = levels[0].width;
  torch::stable::parallel_for(0, points.count, kRowsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t point = begin; point < end; ++point) {
      T* out = rows + point * num_channels;
      if (points.images[point] < 0) {
        std::fill_n(out, num_channels, T(0));
        continue;
      }
      for (const Level<const T>& level : levels) {
        const Taps<Sum<T>> taps(points, point, height, width, level);
        const T* image = level.data + points.images[point] * level.image_stride;
        for (int64_t channel = 0; channel < level.channels; ++channel, image += level.channel_stride) {
          Sum<T> sum = 0;
          for (int64_t tap = 0; tap < taps.count; ++tap) {
            sum += taps.weights[tap] * static_cast<Sum<T>>(image[taps.offsets[tap]]);
          }
          *out++ = static_cast<T>(sum);
        }
      }
    }
  });
}

// The points of every image, in their given order, without padding.
struct Groups {
  std::vector<int64_t> points, starts;  // image i has points[starts[i]] to points[starts[i + 1] - 1]

  Groups(const Points& all, int64_t num_images) : points(all.count), starts(num_images + 2) {
    for (int64_t point = 0; point < all.count; ++point) {
      if (all.images[point] >= 0) ++starts[all.images[point] + 2];
    }
    for (int64_t image = 2; image <= num_images; ++image) starts[image] += starts[image - 1];
    for (int64_t point = 0; point < all.count; ++point) {
      if (all.images[point] >= 0) points[starts[all.images[point] + 1]++] = point;
    }
  }
};

template <typename T>
void scatter(const Tensor& of_rows, const Points& points, const std::vector<Tensor>& gradients) {
  const T* rows = static_cast<const T*>(of_rows.const_data_ptr());
  const int64_t num_channels = of_rows.size(1);
  const int64_t num_images = gradients[0].size(0), num_levels = static_cast<int64_t>(gradients.size());
  std::vector<Level<T>> levels;
  std::vector<int64_t> first_channel{0};
  for (const Tensor& gradient : gradients) {
    levels.emplace_back(static_cast<T*>(gradient.mutable_data_ptr()), gradient);
    first_channel.push_back(first_channel.back() + gradient.size(1));
  }
  const int64_t height = levels[0].height, width = levels[0].width;
  const Groups groups(points, num_images);

  torch::stable::parallel_for(0, num_images * num_levels, 1, [&](int64_t begin, int64_t end) {
    std::vector<Sum<T>> wide;  // sums of a 16-bit type
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / num_levels, l = task % num_levels;
      const Level<T>& level = levels[l];
      const int64_t numel = level.channels * level.height * level.width;
      T* out = level.data + image * level.image_stride;
      Sum<T>* sums;
      if constexpr (std::is_same_v<T, Sum<T>>) {
        std::fill_n(out, numel, T(0));
        sums = out;
      } else {
        wide.assign(numel, 0);
        sums = wide.data();
      }
      for (int64_t place = groups.starts[image]; place < groups.starts[image + 1]; ++place) {
        const int64_t point = groups.points[place];
        const Taps<Sum<T>> taps(points, point, height, width, level);
        const T* row = rows + point * num_channels + first_channel[l];
        for (int64_t channel = 0; channel < level.channels; ++channel) {
          Sum<T>* of_channel = sums + channel * level.channel_stride;
          const auto value = static_cast<Sum<T>>(row[channel]);
          for (int64_t tap = 0; tap < taps.count; ++tap) of_channel[taps.offsets[tap]] += taps.weights[tap] * value;
        }
      }
      if constexpr (!std::is_same_v<T, Sum<T>>) {
        std::transform(sums, sums + numel, out, [](Sum<T> sum) { return static_cast<T>(sum); });
      }
    }
  });
}

template <typename F>
void dispatch(ScalarType dtype, const F& f) {
  THO_DISPATCH_SWITCH(dtype, "sample_nuclei", THO_DISPATCH_CASE(ScalarType::Double, [&] { f(scalar_t{}); })
                      THO_DISPATCH_CASE(ScalarType::Float, [&] { f(scalar_t{}); })
                      THO_DISPATCH_CASE(ScalarType::BFloat16, [&] { f(scalar_t{}); })
                      THO_DISPATCH_CASE(ScalarType::Half, [&] { f(scalar_t{}); }));
}

// levels, each [I, c_l, h_l, w_l], xy [N, 2], image_index [N] int64 -> rows [N, sum c_l].
Tensor sample_nuclei_fwd(const std::vector<Tensor>& levels, const Tensor& xy, const Tensor& image_index,
                         int64_t view_size) {
  STD_TORCH_CHECK(!levels.empty(), "sample_nuclei: at least one level is needed");
  const ScalarType dtype = levels[0].scalar_type();
  int64_t num_channels = 0;
  for (const Tensor& level : levels) {
    STD_TORCH_CHECK(level.dim() == 4 && level.scalar_type() == dtype && level.size(0) == levels[0].size(0),
                    "sample_nuclei: levels must be [I, c, h, w] of one dtype");
    STD_TORCH_CHECK(level.size(2) > 0 && level.size(3) > 0, "sample_nuclei: a level has no pixels");
    num_channels += level.size(1);
  }
  const Points points = checked_points(xy, image_index, view_size, levels[0].size(0));
  Tensor rows = torch::stable::new_empty(levels[0], {points.count, num_channels});
  dispatch(dtype, [&]<typename T>(T) { sample<T>(levels, points, rows); });
  return rows;
}

// gradient [N, sum c_l] -> gradients of the levels; shapes = c_0, h_0, w_0, c_1, ...
std::vector<Tensor> sample_nuclei_bwd(const Tensor& gradient, const Tensor& xy, const Tensor& image_index,
                                      int64_t view_size, int64_t num_images, std::vector<int64_t> shapes,
                                      bool channels_last) {
  STD_TORCH_CHECK(!shapes.empty() && shapes.size() % 3 == 0, "sample_nuclei: shapes must be c, h, w of every level");
  const Points points = checked_points(xy, image_index, view_size, num_images);
  const MemoryFormat format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  std::vector<Tensor> gradients;
  int64_t num_channels = 0;
  for (size_t place = 0; place < shapes.size(); place += 3) {
    const int64_t channels = shapes[place], height = shapes[place + 1], width = shapes[place + 2];
    STD_TORCH_CHECK(channels >= 0 && height > 0 && width > 0, "sample_nuclei: a level has no pixels");
    gradients.push_back(torch::stable::empty({num_images, channels, height, width}, gradient.scalar_type(),
                                             std::nullopt, std::nullopt, std::nullopt, format));
    num_channels += channels;
  }
  STD_TORCH_CHECK(gradient.dim() == 2 && gradient.size(0) == points.count && gradient.size(1) == num_channels,
                  "sample_nuclei: the gradient must be [", points.count, ", ", num_channels, "]");
  const Tensor rows = torch::stable::contiguous(gradient);
  dispatch(gradient.scalar_type(), [&]<typename T>(T) { scatter<T>(rows, points, gradients); });
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(muse_fast, CPU, library) {
  library.impl("sample_nuclei_fwd", TORCH_BOX(&sample_nuclei_fwd));
  library.impl("sample_nuclei_bwd", TORCH_BOX(&sample_nuclei_bwd));
}
