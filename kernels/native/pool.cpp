// What touches each value once or a few times: pools, sums, gates, and changes of layout.

#include <algorithm>
#include <cmath>
#include <limits>

#include "step.h"
#include "vec.h"

namespace blnet {

// A piece of work is a chunk of rows of one block of channels of one image. Chunks come before
// blocks, so that each thread has the rows that it has of convolutions.
struct Plane {
  int64_t image, block, top, bottom;  // rows of the output
  const float* source;
  float* target;

  Plane(const Step& s, int64_t item) : block(item % s.blocks) {
    const Cut rows(s.out_height, item / s.blocks % s.chunks, s.chunks);
    top = rows.begin, bottom = rows.end;
    image = item / s.blocks / s.chunks;
    source = s.source + image * s.source_image + block * s.height * s.width * kBlock;
    target = s.target + image * s.target_image + block * s.out_height * s.out_width * kBlock;
  }
};

// Windows are [first, end) in rows and columns, with the length to divide by: [i][3].
template <bool Average>
void pool(const Step& s, int64_t item) {
  Plane plane(s, item);
  float* out = plane.target + plane.top * s.out_width * kBlock;
  for (int64_t y = plane.top; y < plane.bottom; ++y) {
    const int32_t* row = s.rows + 3 * y;
    for (int64_t x = 0; x < s.out_width; ++x, out += kBlock) {
      const int32_t* column = s.columns + 3 * x;
      const float scale = 1.0f / (static_cast<float>(row[2]) * static_cast<float>(column[2]));
      for (int part = 0; part < kParts; ++part) {
        const float* in = plane.source + part * kLanes;
        Vec all = fill(Average ? 0.0f : -std::numeric_limits<float>::infinity());
        for (int64_t i = row[0]; i < row[1]; ++i) {
          const float* line = in + i * s.width * kBlock;
          // A sum for each row: a long sum of one run would lose digits.
          Vec sum = fill(Average ? 0.0f : -std::numeric_limits<float>::infinity());
          for (int64_t j = column[0]; j < column[1]; ++j) {
            const Vec value = load(line + j * kBlock);
            sum = Average ? sum + value : larger(sum, value);
          }
          all = Average ? all + sum : larger(all, sum);
        }
        store(out + part * kLanes, Average ? all * scale : all);
      }
    }
  }
}

// Without a source, or without a residual, the other one is all there is.
template <bool Multiply>
void combine_pixels(const Step& s, const Plane& plane) {
  const float* other = s.residual ? s.residual + plane.image * s.residual_image +
                                        plane.block * s.residual_block
                                  : nullptr;
  const Vec bound = least(s.relu);
  for (int64_t p = plane.top * s.out_width; p < plane.bottom * s.out_width; ++p) {
    for (int part = 0; part < kParts; ++part) {
      const int64_t at = p * kBlock + part * kLanes;
      const int64_t from = s.table ? s.table[p] * kBlock + part * kLanes : at;
      Vec value = load(s.source ? plane.source + at : other + from);
      if (s.source && other)
        value = Multiply ? value * load(other + from) : value + load(other + from);
      store(plane.target + at, at_least(bound, value));
    }
  }
}

void combine(const Step& s, int64_t item) {
  const Plane plane(s, item);
  if (s.multiply)
    combine_pixels<true>(s, plane);
  else
    combine_pixels<false>(s, plane);
}

void affine(const Step& s, int64_t item) {
  const Plane plane(s, item);
  const Vec bound = least(s.relu);
  for (int part = 0; part < kParts; ++part) {
    const Vec scale = load(s.weight + plane.block * kBlock + part * kLanes);
    const Vec shift = load(s.bias + plane.block * kBlock + part * kLanes);
    for (int64_t p = plane.top * s.out_width; p < plane.bottom * s.out_width; ++p) {
      const int64_t at = p * kBlock + part * kLanes;
      const Vec value = load(plane.source + at) * scale + shift;
      store(plane.target + at, at_least(bound, value));
    }
  }
}

void sigmoid(const Step& s, int64_t item) {
  const Plane plane(s, item);
  const int64_t row = s.out_width * kBlock;
  for (int64_t i = plane.top * row; i < plane.bottom * row; ++i)
    plane.target[i] = 1.0f / (1.0f + std::exp(-plane.source[i]));
}

// Channels that the map does not have are zeros, so that a convolution may read them.
void import_map(const Step& s, const Call& call, int64_t item) {
  const Plane plane(s, item);
  const int64_t first = plane.block * kBlock, have = std::min(kBlock, s.channels - first);
  const float* from = call.input + (s.first_image + plane.image) * call.stride_n + first * call.stride_c;
  float* to = plane.target + plane.top * s.width * kBlock;
  for (int64_t y = plane.top; y < plane.bottom; ++y)
    for (int64_t x = 0; x < s.width; ++x, to += kBlock)
      for (int64_t c = 0; c < kBlock; ++c)
        to[c] = c < have ? from[y * call.stride_h + x * call.stride_w + c * call.stride_c] : 0.0f;
}

// The caller's tensor is contiguous: [image][channel][pixel], or [image][pixel][channel].
void export_map(const Step& s, const Call& call, int64_t item) {
  const int64_t image = item / s.blocks, block = item % s.blocks;
  const int64_t pixels = s.height * s.width, first = block * kBlock;
  const int64_t have = std::min(kBlock, s.channels - first);
  const float* from = s.source + image * s.source_image + block * pixels * kBlock;
  float* to = call.outputs[s.output] + image * s.channels * pixels;
  if (s.channels_last) {
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0; c < have; ++c) to[p * s.channels + first + c] = from[p * kBlock + c];
    return;
  }
  for (int64_t c = 0; c < have; ++c)
    for (int64_t p = 0; p < pixels; ++p) to[(first + c) * pixels + p] = from[p * kBlock + c];
}

}  // namespace blnet
