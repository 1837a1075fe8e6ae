// Cuts a band of rows out of a JPEG at its restart markers, without decoding. Host code without tensors: the Python
// module muse_fast._jpeg. muse_fast/images/jpeg_rows.py does the same in Python and explains the method; the results
// are identical, byte for byte and None for None.
//
// The input is untrusted: every read is bounds-checked.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

using Bytes = std::span<const uint8_t>;

constexpr uint8_t SOF0 = 0xC0, SOF1 = 0xC1, DHT = 0xC4, RST0 = 0xD0, SOI = 0xD8, EOI = 0xD9, SOS = 0xDA, DQT = 0xDB,
                  DRI = 0xDD, APP0 = 0xE0, APP15 = 0xEF, COM = 0xFE;
constexpr size_t BLOCK = 8;  // side in pixels

struct Header {
  size_t height_at = 0;  // offset of the two bytes of the frame's height; 0: no frame yet
  size_t scan_at = 0;    // first byte of entropy-coded data
  size_t width = 0, height = 0;
  size_t interval = 0;  // MCUs between restart markers
  size_t mcu_width = 0, mcu_height = 0;
  size_t components = 0;
  bool blends_rows = false;  // chroma is subsampled vertically, so upsampling reads neighbouring rows
};

struct Band {
  Header header;
  size_t begin = 0, end = 0;     // the entropy-coded data of its rows
  size_t first_row = 0, height = 0;
  std::vector<size_t> restarts;  // offsets of the restart markers between begin and end
};

size_t two_bytes(Bytes data, size_t at) { return size_t{data[at]} << 8 | data[at + 1]; }

size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

// Reads a frame of 8-bit samples; body: the bytes after the length of SOF0 or SOF1.
bool read_frame(Bytes body, Header& header) {
  if (body.size() < 6 || body[0] != 8) return false;
  header.height = two_bytes(body, 1);
  header.width = two_bytes(body, 3);
  header.components = body[5];
  const size_t n = header.components;
  if (header.height == 0 || header.width == 0 || n < 1 || n > 4 || body.size() != 6 + 3 * n) return false;
  size_t across = 0, down = 0, least_down = 4;
  for (size_t c = 0; c < n; ++c) {
    const size_t h = body[7 + 3 * c] >> 4, v = body[7 + 3 * c] & 15;
    if (h < 1 || h > 4 || v < 1 || v > 4) return false;
    across = std::max(across, h);
    down = std::max(down, v);
    least_down = std::min(least_down, v);
  }
  if (n == 1) across = down = 1;  // the blocks of a single component are not interleaved
  header.mcu_width = BLOCK * across;
  header.mcu_height = BLOCK * down;
  header.blends_rows = n > 1 && least_down < down;
  return true;
}

// Whether a scan has all components and all coefficients; body: the bytes after the length of SOS.
bool is_whole_scan(Bytes body, const Header& header) {
  const size_t n = header.components;
  if (body.size() != 4 + 2 * n || body[0] != n) return false;
  return body[1 + 2 * n] == 0 && body[2 + 2 * n] == 63 && body[3 + 2 * n] == 0;
}

std::optional<Header> read_header(Bytes data) {
  if (data.size() < 2 || data[0] != 0xFF || data[1] != SOI) return {};
  Header header;
  size_t at = 2;
  for (;;) {
    if (at >= data.size() || data[at] != 0xFF) return {};
    while (at < data.size() && data[at] == 0xFF) ++at;  // fill bytes may precede a marker
    if (data.size() - at < 3) return {};
    const uint8_t marker = data[at++];
    const size_t length = two_bytes(data, at);
    if (length < 2 || length > data.size() - at) return {};
    const Bytes body = data.subspan(at + 2, length - 2);
    if (marker == SOF0 || marker == SOF1) {
      if (header.height_at || !read_frame(body, header)) return {};
      header.height_at = at + 3;
    } else if (marker == DRI) {
      if (body.size() != 2) return {};
      header.interval = two_bytes(body, 0);
    } else if (marker == SOS) {
      if (!header.height_at || !is_whole_scan(body, header)) return {};
      header.scan_at = at + length;
      return header;
    } else if (marker != DHT && marker != DQT && marker != COM && !(marker >= APP0 && marker <= APP15)) {
      return {};
    }
    at += length;
  }
}

// The offset of the 0xFF of the next marker at or after `at`, or data.size(). A 0xFF before a 0 is data, a 0xFF before
// another 0xFF is a fill byte.
size_t find_marker(Bytes data, size_t at) {
  while (at < data.size()) {
    const void* found = std::memchr(data.data() + at, 0xFF, data.size() - at);
    if (!found) break;
    at = static_cast<const uint8_t*>(found) - data.data();
    if (at + 1 >= data.size()) break;
    const uint8_t next = data[at + 1];
    if (next != 0 && next != 0xFF) return at;
    at += next == 0 ? 2 : 1;
  }
  return data.size();
}

std::optional<Band> find_band(Bytes data, int64_t top, int64_t bottom) {
  const std::optional<Header> found = read_header(data);
  if (!found || !found->interval) return {};
  const Header& header = *found;
  if (top < 0 || bottom <= top || static_cast<uint64_t>(bottom) > header.height) return {};

  const size_t rows = divide_up(header.height, header.mcu_height), per_row = divide_up(header.width, header.mcu_width);
  const size_t margin = header.blends_rows ? 1 : 0;
  size_t first = top / header.mcu_height, stop = divide_up(bottom, header.mcu_height);
  first -= std::min(first, margin);
  stop = std::min(stop + margin, rows);
  // A row of MCUs and a restart interval begin together every `group_rows` rows.
  const size_t common = std::gcd(header.interval, per_row);
  const size_t group_rows = header.interval / common, group_intervals = per_row / common;
  first -= first % group_rows;
  stop = std::min(divide_up(stop, group_rows) * group_rows, rows);
  const size_t intervals = divide_up(rows * per_row, header.interval);
  const size_t begins = first / group_rows * group_intervals;
  const size_t stops = stop == rows ? intervals : stop / group_rows * group_intervals;

  Band band;
  band.header = header;
  size_t at = header.scan_at;
  for (size_t i = 0; i < stops; ++i) {
    if (i == begins) band.begin = at;
    const size_t marker = find_marker(data, at);
    const uint8_t expected = i + 1 == intervals ? EOI : RST0 + i % 8;
    if (marker == data.size() || data[marker + 1] != expected) return {};
    if (i >= begins) band.restarts.push_back(marker);
    at = marker + 2;
  }
  band.end = band.restarts.back();  // EOI replaces the marker after the band
  band.restarts.pop_back();
  band.first_row = first * header.mcu_height;
  band.height = std::min(stop * header.mcu_height, header.height) - band.first_row;
  return band;
}

// `out` has room for size_of(band) bytes.
void write_band(Bytes data, const Band& band, uint8_t* out) {
  const Header& header = band.header;
  std::memcpy(out, data.data(), header.scan_at);
  out[header.height_at] = static_cast<uint8_t>(band.height >> 8);
  out[header.height_at + 1] = static_cast<uint8_t>(band.height & 255);
  uint8_t* scan = out + header.scan_at;
  std::memcpy(scan, data.data() + band.begin, band.end - band.begin);
  for (size_t i = 0; i < band.restarts.size(); ++i) scan[band.restarts[i] - band.begin + 1] = RST0 + i % 8;
  scan[band.end - band.begin] = 0xFF;
  scan[band.end - band.begin + 1] = EOI;
}

size_t size_of(const Band& band) { return band.header.scan_at + (band.end - band.begin) + 2; }

Bytes view(const py::bytes& bytes) {
  const std::string_view text = bytes;
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

py::object cut_rows(const py::bytes& jpeg, int64_t top, int64_t bottom) {
  const Bytes data = view(jpeg);  // bytes are immutable, and the caller's reference keeps them alive
  std::optional<Band> band;
  {
    py::gil_scoped_release release;
    band = find_band(data, top, bottom);
  }
  if (!band) return py::none();
  py::bytes out(static_cast<const char*>(nullptr), size_of(*band));
  auto* target = reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(out.ptr()));
  {
    py::gil_scoped_release release;
    write_band(data, *band, target);
  }
  return py::make_tuple(std::move(out), band->first_row);
}

size_t count_scans(const py::bytes& jpeg) {
  const Bytes data = view(jpeg);
  py::gil_scoped_release release;
  size_t count = 0;
  for (size_t at = find_marker(data, 0); at < data.size(); at = find_marker(data, at + 2)) count += data[at + 1] == SOS;
  return count;
}

}  // namespace

PYBIND11_MODULE(_jpeg, module) {
  module.doc() = "Compiled version of muse_fast.images.jpeg_rows.";
  module.def("cut_rows", &cut_rows, py::arg("jpeg"), py::arg("top"), py::arg("bottom"));
  module.def("count_scans", &count_scans, py::arg("jpeg"));
}
