// Convolutions as sums over "segments": the pieces of input that an output pixel reads.
//
// A work piece is a chunk of output rows of one image and a slice of output channels. Where pixels
// read more than themselves, the chunk's input is first copied into scratch memory, zeros around
// it and strided columns sorted by their remainder. Neighbouring output pixels then read
// neighbouring input, no pixel is a special case, and one kernel serves every convolution.

#include <algorithm>
#include <cstring>
#include <utility>

#include "step.h"
#include "vec.h"

namespace blnet {

// One call of the innermost kernel: `Rows` x `Pixels` output pixels of kGroup channels (or 16).
struct Tile {
  const float* input;
  int64_t input_row;  // floats from an output row's input to the next one's
  const int32_t* segments;
  int64_t segment_count;
  const float* weight;  // [segment][step of the segment][channel of the group]
  const float* bias;
  const float* ahead;  // the next group's weights, of which each round fetches `ahead_step` floats
  int64_t ahead_step;
  float* output;
  int64_t output_row, output_block;
  const float* residual;  // null: none
  int64_t residual_row, residual_block;
  const int32_t* table;  // see Step; for this tile's first pixel
  int64_t table_row;
  bool relu;
};

template <int Vectors, int Rows, int Pixels>
inline void finish(const Tile& t, Vec (&sum)[Vectors][Rows * Pixels]) {
  const Vec bound = least(t.relu);
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    const int64_t block = v / kParts, lane = (v % kParts) * kLanes;
    float* out = t.output + block * t.output_block + lane;
    const float* add = t.residual + block * t.residual_block + lane;
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r) {
      if (t.residual && t.table) {
#pragma GCC unroll 14
        for (int p = 0; p < Pixels; ++p)
          sum[v][r * Pixels + p] += load(add + t.table[r * t.table_row + p] * kBlock);
      } else if (t.residual) {
#pragma GCC unroll 14
        for (int p = 0; p < Pixels; ++p)
          sum[v][r * Pixels + p] += load(add + r * t.residual_row + p * kBlock);
      }
#pragma GCC unroll 14
      for (int p = 0; p < Pixels; ++p)
        store(out + r * t.output_row + p * kBlock, at_least(bound, sum[v][r * Pixels + p]));
    }
  }
}

constexpr int kSecondCache = 2;  // __builtin_prefetch's name for it

// Weights come from the third cache or from memory, and small maps use each of them a few times
// only: the first tile of a group would wait for them. So all tiles together fetch the next group's
// meanwhile. Predicted: 8 to 10 % of a network at batch 1, by the rates of steps with small maps
// over those with large ones. Measured on a Xeon: 8 to 9 % there, 6 to 8 % at batch 8, with the
// cuts of direct.py that read weights fewer times 12 to 14 % and 6 to 9 %.
//
// Blocked input has 16 channels in a segment and 16 floats from pixel to pixel, planar input 1.
template <int Vectors, int Rows, int Pixels, int Step>
void kernel(const Tile& t) {
  Vec sum[Vectors][Rows * Pixels];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    const Vec bias = load(t.bias + v * kLanes);
#pragma GCC unroll 14
    for (int p = 0; p < Rows * Pixels; ++p) sum[v][p] = bias;
  }
  const float *w = t.weight, *ahead = t.ahead;
  const int64_t row = t.input_row, ahead_step = t.ahead_step;
  for (int64_t s = 0; s < t.segment_count; ++s) {
    const float* x = t.input + t.segments[s];
    // The next segment's pixels lie a whole map away, where no hardware looks ahead; a line of
    // them in each round, and the weights of 16 rounds later, make a network 4 % faster.
    const float* next = t.input + t.segments[s + 1 < t.segment_count ? s + 1 : s];
#pragma GCC unroll 1
    for (int c = 0; c < Step; ++c, ++x, w += Vectors * kLanes, ahead += ahead_step) {
      if (Step == kBlock && c < Pixels) __builtin_prefetch(next + c * kBlock);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) __builtin_prefetch(w + (16 * Vectors + v) * kLanes);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) __builtin_prefetch(ahead + v * kLanes, 0, kSecondCache);
      Vec weight[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) weight[v] = load(w + v * kLanes);
#pragma GCC unroll 2
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 14
        for (int p = 0; p < Pixels; ++p) {
          const float value = x[r * row + p * Step];
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) sum[v][r * Pixels + p] += weight[v] * value;
        }
      }
    }
  }
  finish<Vectors, Rows, Pixels>(t, sum);
}

using Kernel = void (*)(const Tile&);

struct Kernels {
  Kernel one_row[kPixels];
  Kernel two_rows[kPixels / 2];
};

template <int Vectors, int Step, size_t... One, size_t... Two>
constexpr Kernels list_kernels(std::index_sequence<One...>, std::index_sequence<Two...>) {
  return {{kernel<Vectors, 1, One + 1, Step>...}, {kernel<Vectors, 2, Two + 1, Step>...}};
}

template <int Vectors, int Step>
constexpr Kernels kKernels = list_kernels<Vectors, Step>(std::make_index_sequence<kPixels>(),
                                                         std::make_index_sequence<kPixels / 2>());

// A full group of output channels, or one block of 16 where that is all that is left.
inline const Kernels& kernels_for(bool full, bool planar) {
  if (full) return planar ? kKernels<kVectors, 1> : kKernels<kVectors, kBlock>;
  return planar ? kKernels<kParts, 1> : kKernels<kParts, kBlock>;
}

// Computes a rectangle of output pixels, cut into tiles of about equal size.
inline void rectangle(Tile tile, const Kernels& kernels, int64_t rows, int64_t width,
                      int64_t step) {
  const bool pair = 2 * width <= kPixels;
  const int64_t cuts = (width + kPixels - 1) / kPixels;
  const int64_t tiles = cuts * (pair ? (rows + 1) / 2 : rows), rounds = tile.segment_count * step;
  tile.ahead_step = (kGroup + tiles - 1) / tiles;
  int64_t index = 0;
  for (int64_t y = 0; y < rows;) {
    const int64_t height = pair && y + 1 < rows ? 2 : 1;
    for (int64_t cut = 0; cut < cuts; ++cut) {
      const int64_t x = width * cut / cuts, pixels = width * (cut + 1) / cuts - x;
      Tile part = tile;
      part.input += y * tile.input_row + x * step;
      part.ahead += index++ * rounds * kGroup / tiles;
      part.output += y * tile.output_row + x * kBlock;
      if (tile.table)
        part.table += y * tile.table_row + x;
      else if (tile.residual)
        part.residual += y * tile.residual_row + x * kBlock;
      (height == 2 ? kernels.two_rows : kernels.one_row)[pixels - 1](part);
    }
    y += height;
  }
}

// How a chunk's input lies in scratch memory, in pixels. direct.py computes the same.
struct Patch {
  int64_t rows, phases, phase;  // a row holds `phases` runs of `phase` pixels
  int64_t row_step, column_step;

  explicit Patch(const Step& s) {
    // A 1x1 kernel reads only every stride-th row and column.
    row_step = s.kernel_h == 1 ? s.stride_h : 1;
    column_step = s.kernel_w == 1 ? s.stride_w : 1;
    const int64_t down = s.kernel_h == 1 ? 1 : s.stride_h;
    rows = (s.chunk - 1) * down + s.kernel_h;
    phases = s.kernel_w == 1 ? 1 : s.stride_w;
    phase = ((s.out_width - 1) * phases + s.kernel_w + phases - 1) / phases;
  }
  int64_t row() const { return phases * phase; }
};

// Copies the input of output rows y.. into scratch memory; outside the map there are zeros.
template <int Step_>
void gather(const Step& s, const Patch& patch, const float* source, int64_t stride_row,
            int64_t stride_pixel, int64_t y, int64_t rows, float* to) {
  const int64_t columns = patch.row();
  for (int64_t r = 0; r < rows; ++r, to += columns * Step_) {
    const int64_t line = y * s.stride_h - s.pad_h + r * patch.row_step;
    if (line < 0 || line >= s.height) {
      std::memset(to, 0, columns * Step_ * sizeof(float));
      continue;
    }
    const float* from = source + line * stride_row;
    for (int64_t phase = 0; phase < patch.phases; ++phase) {
      float* run = to + phase * patch.phase * Step_;
      int64_t column = phase * patch.column_step - s.pad_w;
      for (int64_t i = 0; i < patch.phase; ++i, column += patch.phases * patch.column_step) {
        const bool inside = column >= 0 && column < s.width;
        if constexpr (Step_ == 1) {
          run[i] = inside ? from[column * stride_pixel] : 0.0f;
        } else {
          for (int part = 0; part < kParts; ++part)
            store(run + i * kBlock + part * kLanes,
                  inside ? load(from + column * kBlock + part * kLanes) : zero());
        }
      }
    }
  }
}

// Brings the chunk's input into scratch memory: all that the slice's groups read.
inline void gather_chunk(const Step& s, const Call& call, const Patch& patch, int64_t image,
                         int64_t y, int64_t rows, float* scratch) {
  const int64_t down = s.kernel_h == 1 ? 1 : s.stride_h;
  const int64_t needed = (rows - 1) * down + s.kernel_h;
  const int64_t plane = patch.rows * patch.row();
  if (s.planar) {
    for (int64_t c = 0; c < s.channels; ++c)
      gather<1>(s, patch, call.input + (s.first_image + image) * call.stride_n + c * call.stride_c, call.stride_h,
                call.stride_w, y, needed, scratch + c * plane);
    return;
  }
  for (int64_t b = 0; b < s.blocks; ++b)
    gather<kBlock>(s, patch, s.source + image * s.source_image + b * s.height * s.width * kBlock,
                   s.width * kBlock, kBlock, y, needed, scratch + b * plane * kBlock);
}

void direct(const Step& s, const Call& call, int64_t item, float* scratch) {
  const int64_t slice = item % s.slices, chunk = item / s.slices % s.chunks;
  const int64_t image = item / s.slices / s.chunks;
  const bool pointwise = s.kernel_h == 1 && s.kernel_w == 1;
  // What reads a column of the map and nothing around it; 1x1 convolutions, most of the time.
  const bool in_place = s.kernel_w == 1 && s.stride_h == 1 && s.stride_w == 1 && !s.pad_h &&
                        !s.pad_w && !s.planar;
  const int64_t out_pixels = s.out_height * s.out_width, step = s.planar ? 1 : kBlock;
  // In place, a chunk is a run of pixels; else it is rows, which lie end to end if pointwise.
  const Cut cut(in_place ? out_pixels : s.out_height, chunk, s.chunks);
  const int64_t first = cut.begin;
  int64_t rows = cut.size();
  const int64_t pixel = in_place ? first : first * s.out_width;

  Tile tile{};
  int64_t input_block;  // floats from one block of input to the next
  if (in_place) {
    tile.input = s.source + image * s.source_image + first * kBlock;
    input_block = s.height * s.width * kBlock;
  } else {
    const Patch patch(s);
    gather_chunk(s, call, patch, image, first, rows, scratch);
    tile.input = scratch;
    tile.input_row = (s.kernel_h == 1 ? 1 : s.stride_h) * patch.row() * step;
    input_block = patch.rows * patch.row() * step;
  }
  int64_t width = s.out_width;
  if (pointwise || in_place) width = in_place ? rows : rows * s.out_width, rows = 1;

  tile.segments = s.segments;
  tile.segment_count = s.segment_count;
  tile.output_row = s.out_width * kBlock;
  tile.output_block = out_pixels * kBlock;
  tile.residual_row = s.out_width * kBlock;
  tile.residual_block = s.residual_block;
  tile.table = s.table ? s.table + pixel : nullptr;
  tile.table_row = s.out_width;
  tile.relu = s.relu;

  const int64_t groups = (s.out_blocks + kGroupBlocks - 1) / kGroupBlocks;
  const int64_t end = std::min((slice + 1) * s.slice, groups);
  const float* input = tile.input;
  // The piece that this thread probably takes next.
  const int64_t later = item + 1 < s.items ? item + 1 : item;
  const int64_t next = later % s.slices * s.slice;
  for (int64_t g = slice * s.slice; g < end; ++g) {
    const int64_t block = g * kGroupBlocks;
    tile.input = input + (s.starts ? s.starts[g] * input_block : 0);
    tile.weight = s.weight + g * s.segment_count * step * kGroup;
    tile.bias = s.bias + g * kGroup;
    tile.ahead = s.weight + (g + 1 < end ? g + 1 : next) * s.segment_count * step * kGroup;
    tile.output = s.target + image * s.target_image + block * tile.output_block + pixel * kBlock;
    if (s.residual)
      tile.residual = s.residual + image * s.residual_image + block * s.residual_block +
                      (s.table ? 0 : pixel * kBlock);
    const bool full = block + kGroupBlocks <= s.out_blocks;
    rectangle(tile, kernels_for(full, s.planar), rows, width, step);
  }
}

}  // namespace blnet
