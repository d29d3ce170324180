// 3x3 convolutions with strides of 1 and 2 by Winograd's minimal filtering F(m x n, 3 x 3).
//
// Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016. A tile
// of m x n outputs reads (m + 2) x (n + 2) inputs d. With B, A the transforms of each side at the
// points 0, 1, -1, 2, -2, 1/2, -1/2, as many as it needs, and infinity, U the transformed weights
// and V = B^T d B, the outputs are A^T (sum over channels U * V) A: 36 products in place of 144 for
// 4x4, 48 in place of 216 for 4x6. The sums over channels are products of matrices, one for each of
// these points, done by the kernel of conv.cpp as 1x1 convolutions over tiles. Larger tiles save
// more products, and rounding costs more: 6x6 was no faster than 4x6 anywhere.
//
// Along a side with a stride of 2, an output reads two even inputs and an odd one: F(m, 2) on the
// even ones at the points 0, 1(, -1, 2) and infinity, the odd ones as they are; 9 products in place
// of 12 for m = 4, 5 in place of 6 for m = 2.

#include <algorithm>
#include <utility>

#include "step.h"
#include "transforms.h"
#include "vec.h"

namespace blnet {

// Products along a side of a tile, as many as inputs.
constexpr int side(int64_t tile, int64_t stride) { return stride == 1 ? tile + 2 : 2 * tile + 1; }

// A tile of outputs, and the strides that it is for.
template <int Height, int Width, int Down, int Across>
struct Shape {
  static constexpr int kHeight = Height, kWidth = Width, kDown = Down, kAcross = Across;
  static constexpr int kRows = side(Height, Down), kColumns = side(Width, Across);
};

template <int... I>
inline void transform_line(Vec* d, std::integer_sequence<int, I...>) {
  transform_input(d[I]...);
}

// Floats from one point's maps of `blocks` blocks to the next one's. A line more than they fill: the
// stores of a tile go to all points at once, and a multiple of many lines between them would put
// all into a few sets of the first cache. Predicted, from stores to an array alone: 10 to 25 % of
// the input's transform. Measured on a Xeon: 10 to 20 % of it, 1 to 3 % of a convolution.
inline int64_t point_floats(const Step& s, int64_t blocks) {
  return (blocks * s.chunk + 1) * kBlock;
}

// Where a tile lies in the map of outputs.
struct Place {
  int64_t image, y, x;

  Place(const Step& s, int64_t tile) {
    const int64_t across = (s.out_width + s.tile_w - 1) / s.tile_w;
    const int64_t down = (s.out_height + s.tile_h - 1) / s.tile_h;
    image = tile / (across * down);
    y = tile / across % down * s.tile_h;
    x = tile % across * s.tile_w;
  }

  // Goes on to the next tile, without a division.
  void advance(const Step& s) {
    x += s.tile_w;
    if (x < s.out_width) return;
    x = 0, y += s.tile_h;
    if (y < s.out_height) return;
    y = 0, ++image;
  }
};

// What a tile reads of one block: lines, from the tile's first column on.
template <class T>
struct Input {
  const float* lines[T::kRows];
  int64_t first, end;  // the tile's columns that lie in the map

  Input(const Step& s, const Place& place, int64_t block) {
    static const float zeros alignas(64)[T::kColumns * kBlock] = {};  // above and below the map
    const int64_t top = place.y * T::kDown - s.pad_h, left = place.x * T::kAcross - s.pad_w;
    const float* map = s.source + place.image * s.source_image;
    map += block * s.height * s.width * kBlock;
#pragma GCC unroll 9
    for (int i = 0; i < T::kRows; ++i) {
      const int64_t y = top + i;
      lines[i] = y >= 0 && y < s.height ? map + (y * s.width + left) * kBlock : zeros;
    }
    first = -left, end = s.width - left;
  }
  bool whole() const { return first <= 0 && end >= T::kColumns; }
};

// Rows of V: the first, then pairs, whose sums have parts in common, and the last if it is left
// alone. Each goes down the columns of the tile first, where the compiler leaves out what only other
// rows need, then along the row. Two rows fit into registers, a whole V does not. Predicted, with
// tiles counted on and the bias in a product: 3 % of acoustic models. Measured on a Zen 4: V a third
// faster and more, outputs up to a tenth, networks 2 to 3 %.
template <class T, bool Whole, int Group>
inline void scatter_rows(const Input<T>& input, int64_t lane, float* to, int64_t point_stride) {
  constexpr int kFirst = Group ? 2 * Group - 1 : 0;
  constexpr int kCount = Group && kFirst + 1 < T::kRows ? 2 : 1;
  Vec v[kCount][T::kColumns];
#pragma GCC unroll 9
  for (int j = 0; j < T::kColumns; ++j) {
    const bool here = Whole || (j >= input.first && j < input.end);
    Vec d[T::kRows];
#pragma GCC unroll 9
    for (int i = 0; i < T::kRows; ++i)
      d[i] = here ? load(input.lines[i] + j * kBlock + lane) : zero();
    transform_line(d, std::make_integer_sequence<int, T::kRows>());
#pragma GCC unroll 2
    for (int k = 0; k < kCount; ++k) v[k][j] = d[kFirst + k];
  }
#pragma GCC unroll 2
  for (int k = 0; k < kCount; ++k) {
    transform_line(v[k], std::make_integer_sequence<int, T::kColumns>());
#pragma GCC unroll 9
    for (int j = 0; j < T::kColumns; ++j)
      store(to + ((kFirst + k) * T::kColumns + j) * point_stride + lane, v[k][j]);
  }
}

template <class T, bool Whole, int... Group>
inline void scatter_groups(const Input<T>& input, float* to, int64_t point_stride,
                           std::integer_sequence<int, Group...>) {
  for (int part = 0; part < kParts; ++part)
    (scatter_rows<T, Whole, Group>(input, part * kLanes, to, point_stride), ...);
}

// Writes V of one tile and one block: [point][block][tile of the chunk][channel].
template <class T>
inline void scatter_tile(const Step& s, const Place& place, int64_t block, float* to,
                         int64_t point_stride) {
  const Input<T> input(s, place, block);
  constexpr auto kGroups = std::make_integer_sequence<int, T::kRows / 2 + 1>();
  if (input.whole())
    scatter_groups<T, true>(input, to, point_stride, kGroups);
  else
    scatter_groups<T, false>(input, to, point_stride, kGroups);
}

// Reads the products of one tile and one block and writes its outputs.
template <class T>
inline void gather_tile(const Step& s, const Place& place, int64_t block, const float* from,
                        int64_t point_stride) {
  constexpr int kRows = T::kRows, kColumns = T::kColumns;
  const int64_t pixels = s.out_height * s.out_width;
  const int64_t height = std::min<int64_t>(T::kHeight, s.out_height - place.y);
  const int64_t width = std::min<int64_t>(T::kWidth, s.out_width - place.x);
  float* out = s.target + place.image * s.target_image + block * pixels * kBlock;
  const float* add = s.residual ? s.residual + place.image * s.residual_image +
                                      block * s.residual_block
                                : nullptr;
  const Vec bound = least(s.relu);
  for (int part = 0; part < kParts; ++part) {
    Vec half[T::kHeight][kColumns];
#pragma GCC unroll 9
    for (int j = 0; j < kColumns; ++j) {
      Vec m[kRows], y[T::kHeight];
#pragma GCC unroll 9
      for (int i = 0; i < kRows; ++i)
        m[i] = load(from + (i * kColumns + j) * point_stride + part * kLanes);
      transform_output(m, y);
#pragma GCC unroll 6
      for (int i = 0; i < T::kHeight; ++i) half[i][j] = y[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < T::kHeight; ++i) {
      if (i >= height) break;
      Vec y[T::kWidth];
      transform_output(half[i], y);
      const int64_t first = (place.y + i) * s.out_width + place.x;
#pragma GCC unroll 6
      for (int j = 0; j < T::kWidth; ++j) {
        if (j >= width) break;
        const int64_t at = (first + j) * kBlock;
        if (add) y[j] += load(add + (s.table ? s.table[first + j] * kBlock : at) + part * kLanes);
        store(out + at + part * kLanes, at_least(bound, y[j]));
      }
    }
  }
}

// The products of a group of output channels: for each point, tiles x input channels times input
// channels x the group. What is added to that of the point (1, 1) is added to every output of its
// tile: the bias. Weights lie in the order in which they are read; `next` is the group after this.
inline void multiply(const Step& s, int64_t tiles, const float* V, int64_t g, int64_t next,
                     float* products) {
  static const float zeros alignas(64)[kGroup] = {};
  const int64_t points = side(s.tile_h, s.stride_h) * side(s.tile_w, s.stride_w);
  const int64_t one = side(s.tile_w, s.stride_w) + 1;
  const bool full = (g + 1) * kGroupBlocks <= s.out_blocks;
  const int64_t weights = s.blocks * kBlock * (full ? kGroup : kBlock);  // of a point
  const int64_t group_weights = points * s.blocks * kBlock * kGroup;
  Tile tile{};
  tile.segments = s.segments;
  tile.segment_count = s.blocks;
  tile.output_block = s.chunk * kBlock;
  tile.weight = s.weight + g * group_weights;
  for (int64_t point = 0; point < points; ++point, tile.weight += weights) {
    tile.input = V + point * point_floats(s, s.blocks);
    tile.bias = point == one ? s.bias + g * kGroup : zeros;
    tile.ahead = point + 1 < points ? tile.weight + weights : s.weight + next * group_weights;
    tile.output = products + point * point_floats(s, kGroupBlocks);
    rectangle(tile, kernels_for(full, false), 1, tiles, kBlock);
  }
}

// A piece of work is a chunk of tiles and a slice of output channels, a group of which at a time is
// multiplied and transformed, so that its products are still in the second cache.
template <class T>
void winograd_piece(const Step& s, int64_t item, float* scratch) {
  const int64_t down = (s.out_height + T::kHeight - 1) / T::kHeight;
  const int64_t across = (s.out_width + T::kWidth - 1) / T::kWidth, all = s.batch * down * across;
  const Cut chunk(all, item / s.slices, s.chunks);
  const int64_t tiles = chunk.size();
  const int64_t groups = (s.out_blocks + kGroupBlocks - 1) / kGroupBlocks;
  const int64_t slice = item % s.slices * s.slice, end = std::min(slice + s.slice, groups);
  const int64_t point_stride = point_floats(s, s.blocks);
  const Place begin(s, chunk.begin);
  for (int64_t block = 0; block < s.blocks; ++block) {
    Place place = begin;
    for (int64_t t = 0; t < tiles; ++t, place.advance(s))
      scatter_tile<T>(s, place, block, scratch + (block * s.chunk + t) * kBlock, point_stride);
  }
  float* products = scratch + T::kRows * T::kColumns * point_stride;
  const int64_t later = item + 1 < s.items ? item + 1 : item;  // that the thread probably takes
  for (int64_t g = slice; g < end; ++g) {
    const int64_t next = g + 1 < end ? g + 1 : later % s.slices * s.slice;
    multiply(s, tiles, scratch, g, next, products);
    const int64_t first = g * kGroupBlocks, last = std::min(first + kGroupBlocks, s.out_blocks);
    for (int64_t block = first; block < last; ++block) {
      Place place = begin;
      for (int64_t t = 0; t < tiles; ++t, place.advance(s))
        gather_tile<T>(s, place, block, products + ((block - first) * s.chunk + t) * kBlock,
                       point_floats(s, kGroupBlocks));
    }
  }
}

template <int Height, int Width>
void winograd_tiles(const Step& s, int64_t item, float* scratch) {
  if (s.stride_w == 2)
    winograd_piece<Shape<Height, Width, 2, 2>>(s, item, scratch);
  else if (s.stride_h == 2)
    winograd_piece<Shape<Height, Width, 2, 1>>(s, item, scratch);
  else
    winograd_piece<Shape<Height, Width, 1, 1>>(s, item, scratch);
}

void winograd(const Step& s, int64_t item, float* scratch) {
  switch (s.tile_w) {
    case 2: return winograd_tiles<2, 2>(s, item, scratch);
    case 4: return winograd_tiles<4, 4>(s, item, scratch);
    case 5: return winograd_piece<Shape<5, 5, 1, 1>>(s, item, scratch);
    case 6:
      if (s.stride_h == 2) return winograd_piece<Shape<4, 6, 2, 1>>(s, item, scratch);
      return winograd_piece<Shape<4, 6, 1, 1>>(s, item, scratch);
  }
}

}  // namespace blnet
