// The engine: runs a list of steps, each cut into pieces that threads take one at a time.
//
// A convolution's pieces lie in the order of the pixels that they compute, and each thread has the
// same share of them in every step, so that it reads what it wrote itself and its core's cache
// holds; who is done helps the others. Predicted: 1 to 2 % at batch 1. Measured on a Xeon, two threads, against one
// count for all: 1 to 3 % at batch 1, nothing at batch 8.
//
// One parallel region runs the whole list, so that threads wake once in a call. OpenMP, because
// PyTorch has its threads from there: the library loads the runtime that PyTorch has loaded, and
// no second pool of threads competes with the first one for the cores.

#include <algorithm>

#include "conv.cpp"
#include "pool.cpp"
#include "stem.cpp"
#include "winograd.cpp"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace blnet {

void piece(const Step& s, const Call& call, int64_t item, float* scratch) {
  switch (s.kind) {
    case kImport: return import_map(s, call, item);
    case kExport: return export_map(s, call, item);
    case kDirect: return direct(s, call, item, scratch);
    case kWinograd: return winograd(s, item, scratch);
    case kAverage: return pool<true>(s, item);
    case kMaximum: return pool<false>(s, item);
    case kCombine: return combine(s, item);
    case kAffine: return affine(s, item);
    case kSigmoid: return sigmoid(s, item);
    case kStem: return stem(s, call, item, scratch);
  }
}

// Steps of images that this thread alone works on: no other thread is waited for.
void run_alone(const Step* steps, int64_t count, const Call& call, int thread) {
  float* scratch = call.scratch + thread * call.scratch_floats;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t item = 0; item < steps[i].items; ++item) piece(steps[i], call, item, scratch);
}

// All threads' work at a step, beginning with this thread's own share.
void take_pieces(const Step& s, int64_t step, const Call& call, int thread, float* scratch) {
  for (int64_t turn = 0; turn < call.threads; ++turn) {
    const int64_t owner = (thread + turn) % call.threads;
    const int64_t begin = s.items * owner / call.threads;
    const int64_t count = s.items * (owner + 1) / call.threads - begin;
    int64_t* taken = call.taken + (step * call.threads + owner) * kLine;
    int64_t next;
    while ((next = __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED)) < count)
      piece(s, call, begin + next, scratch);
  }
}

void run_share(const Step* steps, int64_t count, const Call& call, int thread) {
  float* scratch = call.scratch + thread * call.scratch_floats;
  for (int64_t i = 0; i < count; ++i) {
    take_pieces(steps[i], i, call, thread, scratch);
#ifdef _OPENMP
#pragma omp barrier
#endif
  }
}

}  // namespace blnet

extern "C" {

// Output channels of a full kernel, pixels of a full kernel, bytes of a step, whether threads work,
// bits of a vector.
void blnet_native_facts(int64_t* facts) {
  facts[0] = blnet::kGroup;
  facts[1] = blnet::kPixels;
  facts[2] = sizeof(blnet::Step);
#ifdef _OPENMP
  facts[3] = 1;
#else
  facts[3] = 0;
#endif
  facts[4] = 8 * blnet::kLanes * sizeof(float);
}

// First `lanes` lists of `alone` steps, each of which one thread runs, then steps for all threads.
void blnet_native_run(const blnet::Step* steps, int64_t lanes, int64_t alone, int64_t count,
                      const blnet::Call* call, int64_t threads) {
  const blnet::Step* shared = steps + lanes * alone;
  const int64_t rest = count - lanes * alone;
  std::fill_n(call->taken, rest * call->threads * blnet::kLine, 0);
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
      const int thread = omp_get_thread_num();
      for (int64_t lane = thread; lane < lanes; lane += omp_get_num_threads())
        blnet::run_alone(steps + lane * alone, alone, *call, thread);
#pragma omp barrier
      blnet::run_share(shared, rest, *call, thread);
    }
    return;
  }
#endif
  for (int64_t lane = 0; lane < lanes; ++lane)
    blnet::run_alone(steps + lane * alone, alone, *call, 0);
  blnet::run_share(shared, rest, *call, 0);
}
}
