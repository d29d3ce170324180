// What one step of a program is told. library.py mirrors the struct; the order of fields is theirs.
#pragma once

#include <cstdint>

namespace blnet {

// Maps lie in memory as [image][channel / 16][pixel][channel % 16]: a block of 16 channels.
constexpr int64_t kBlock = 16;
constexpr int64_t kLine = 8;  // numbers of 64 bits in a line of the caches

enum Kind : int64_t {
  kImport = 0,    // the caller's tensor -> blocked map
  kExport = 1,    // blocked map -> the caller's tensor
  kDirect = 2,    // convolution, summed as it is written
  kWinograd = 3,  // 3x3 convolution with strides of 1 and 2
  kAverage = 4,   // window averages: pools, adaptive pools, the global mean
  kMaximum = 5,   // window maxima
  kCombine = 6,   // source (+ or *) residual, pixel by pixel, then ReLU
  kAffine = 7,    // source * weight[channel] + bias[channel], then ReLU
  kSigmoid = 8,
  kStem = 9,  // 7x7 convolution of the call's input with a stride of 2
};

struct Step {
  int64_t kind;
  int64_t items;  // pieces of work, which threads take one at a time
  // Where maps lie. A null source is the call's input, a null target its output.
  const float* source;
  float* target;
  const float* residual;
  const float* weight;
  const float* bias;
  const int32_t* segments;  // offsets of the input that one output pixel reads, in floats
  const int32_t* table;     // pixel of the residual for each output pixel; null: the same
  const int32_t* rows;      // windows of a pool: first, end, and length to divide by, for each row
  const int32_t* columns;   // and for each column
  const int32_t* starts;    // first block of input of each group of output channels; null: 0
  // Sizes, of the map read and of the map written; blocks are channels / 16, rounded up.
  int64_t first_image;  // of the caller's tensor, where a step works on a part of the batch
  int64_t batch, channels, blocks, height, width;
  int64_t out_channels, out_blocks, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  // Floats from one image to the next.
  int64_t source_image, target_image, residual_image;
  int64_t residual_block;  // floats from one block of the residual to the next
  int64_t relu, multiply;
  // How the work is cut.
  int64_t chunk, chunks;  // rows (pixels of a 1x1 convolution, tiles of Winograd): most in a piece
  int64_t slice, slices;  // groups of output channels (see kGroup) in a piece
  int64_t segment_count;  // for one group of output channels
  int64_t planar;         // the source is the call's input, read as it is
  int64_t tile_h, tile_w;  // Winograd: outputs along the sides of a tile
  int64_t output;         // kExport: which of the call's outputs
  int64_t channels_last;  // kExport: written pixel by pixel, not channel by channel
};

// What a piece of work covers of `all` rows, pixels or tiles: as much as any other, or one less.
struct Cut {
  int64_t begin, end;

  Cut(int64_t all, int64_t piece, int64_t pieces)
      : begin(all * piece / pieces), end(all * (piece + 1) / pieces) {}
  int64_t size() const { return end - begin; }
};

struct Call {
  const float* input;
  int64_t stride_n, stride_c, stride_h, stride_w;  // of the input, in floats
  float* outputs[8];
  float* scratch;  // scratch_floats for each thread
  int64_t scratch_floats;
  int64_t threads;  // that work on it
  int64_t* taken;   // how many pieces of each thread's share are taken: [step][thread][kLine]
};

}  // namespace blnet
