// Winograd's transforms along a line of inputs or products, see winograd.cpp and stem.cpp.
#pragma once

#include "vec.h"

namespace blnet {

// One row or column of B^T d, in place, and below of A^T m.
inline void transform_input(Vec& d0, Vec& d1, Vec& d2, Vec& d3) {
  const Vec t0 = d0 - d2, t1 = d1 + d2, t2 = d2 - d1, t3 = d3 - d1;
  d0 = t0, d1 = t1, d2 = t2, d3 = t3;
}

template <class T>
inline void transform_input(T& d0, T& d1, T& d2, T& d3, T& d4, T& d5) {
  const T even = d4 - 4.0f * d2, odd = d3 - 4.0f * d1;
  const T outer = d4 - d2, twice = 2.0f * (d3 - d1);
  d0 = 4.0f * d0 - 5.0f * d2 + d4;
  d5 = 4.0f * d1 - 5.0f * d3 + d5;
  d1 = even + odd, d2 = even - odd, d3 = outer + twice, d4 = outer - twice;
}

// Seven inputs, at the points 0, 1, -1, 2, -2, 1/2 and infinity.
template <class T>
inline void transform_input(T& d0, T& d1, T& d2, T& d3, T& d4, T& d5, T& d6) {
  const T t0 = 4.0f * d1 + 2.5f * d2 - 2.0f * d0 - 5.0f * d3 - 0.5f * d4 + d5;
  const T t1 = 2.0f * (d1 - d2) - 4.5f * d3 + 0.5f * d4 + d5;
  const T t2 = 6.0f * d2 - 2.0f * d1 - 3.5f * d3 - 1.5f * d4 + d5;
  const T t3 = d1 + 1.5f * (d4 - d2) - 2.0f * d3 + d5;
  const T t4 = 2.5f * (d2 - d4) + d5 - d1;
  const T t5 = 4.0f * d1 - 5.0f * d3 + d5;
  d6 = 4.0f * d2 - 2.0f * d1 + 2.5f * d3 - 5.0f * d4 - 0.5f * d5 + d6;
  d0 = t0, d1 = t1, d2 = t2, d3 = t3, d4 = t4, d5 = t5;
}

// Eight inputs, at the points 0, 1, -1, 2, -2, 1/2, -1/2 and infinity.
inline void transform_input(Vec& d0, Vec& d1, Vec& d2, Vec& d3, Vec& d4, Vec& d5, Vec& d6,
                            Vec& d7) {
  const Vec t0 = d0 - d6 + 5.25f * (d4 - d2), t7 = d7 - d1 + 5.25f * (d3 - d5);
  const Vec even1 = d2 + d6 - 4.25f * d4, odd1 = d1 + d5 - 4.25f * d3;
  const Vec even2 = 0.25f * d2 - 1.25f * d4 + d6, odd2 = 0.5f * d1 - 2.5f * d3 + 2.0f * d5;
  const Vec even3 = 4.0f * d2 - 5.0f * d4 + d6, odd3 = 2.0f * d1 - 2.5f * d3 + 0.5f * d5;
  d0 = t0, d7 = t7;
  d1 = even1 + odd1, d2 = even1 - odd1, d3 = even2 + odd2, d4 = even2 - odd2;
  d5 = even3 + odd3, d6 = even3 - odd3;
}

// With a stride of 2, two outputs and four: what is made of the even inputs, then the odd ones.
inline void transform_input(Vec& d0, Vec& d1, Vec& d2, Vec& d3, Vec& d4) {
  const Vec t0 = d0 - d2, t2 = d2 - d4;
  d4 = d3, d3 = d1, d1 = d2, d0 = t0, d2 = t2;
}

inline void transform_input(Vec& d0, Vec& d1, Vec& d2, Vec& d3, Vec& d4, Vec& d5, Vec& d6, Vec& d7,
                            Vec& d8) {
  const Vec outer = d6 - d2, inner = d2 - d4;
  const Vec t0 = 2.0f * (d0 - d4) + outer, t1 = outer - d2 - d4, t2 = 3.0f * inner + outer;
  const Vec t4 = d8 - d4 - 2.0f * outer;
  d8 = d7, d7 = d5, d6 = d3, d5 = d1;
  d0 = t0, d1 = t1, d2 = t2, d3 = outer, d4 = t4;
}

inline void transform_output(const Vec (&m)[9], Vec (&y)[4]) {
  const Vec sum = m[1] + m[2], difference = m[1] - m[2];
  y[0] = m[0] + sum + m[3] + m[5];
  y[1] = difference + 2.0f * m[3] + m[6];
  y[2] = sum + 4.0f * m[3] + m[7];
  y[3] = difference + 8.0f * m[3] + m[4] + m[8];
}

inline void transform_output(const Vec (&m)[5], Vec (&y)[2]) {
  y[0] = m[0] + m[1] + m[3];
  y[1] = m[1] - m[2] + m[4];
}

inline void transform_output(const Vec (&m)[4], Vec (&y)[2]) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2] + m[3];
}

inline void transform_output(const Vec (&m)[6], Vec (&y)[4]) {
  const Vec sum1 = m[1] + m[2], difference1 = m[1] - m[2];
  const Vec sum2 = m[3] + m[4], difference2 = m[3] - m[4];
  y[0] = m[0] + sum1 + sum2;
  y[1] = difference1 + 2.0f * difference2;
  y[2] = sum1 + 4.0f * sum2;
  y[3] = difference1 + 8.0f * difference2 + m[5];
}

// Four outputs of a kernel of four, or five of a kernel of three.
template <int Outputs>
inline void transform_output(const Vec (&m)[7], Vec (&y)[Outputs]) {
  const Vec sum1 = m[1] + m[2], difference1 = m[1] - m[2];
  const Vec sum2 = m[3] + m[4], difference2 = m[3] - m[4];
  y[0] = m[0] + sum1 + sum2 + m[5];
  y[1] = difference1 + 2.0f * difference2 + 0.5f * m[5];
  y[2] = sum1 + 4.0f * sum2 + 0.25f * m[5];
  y[3] = difference1 + 8.0f * difference2 + 0.125f * m[5];
  if constexpr (Outputs == 5) y[4] = sum1 + 16.0f * sum2 + 0.0625f * m[5];
  y[Outputs - 1] += m[6];
}

inline void transform_output(const Vec (&m)[8], Vec (&y)[6]) {
  const Vec sum1 = m[1] + m[2], difference1 = m[1] - m[2];
  const Vec sum2 = m[3] + m[4], difference2 = m[3] - m[4];
  const Vec sum3 = m[5] + m[6], difference3 = m[5] - m[6];
  y[0] = m[0] + sum1 + sum2 + sum3;
  y[1] = difference1 + 2.0f * difference2 + 0.5f * difference3;
  y[2] = sum1 + 4.0f * sum2 + 0.25f * sum3;
  y[3] = difference1 + 8.0f * difference2 + 0.125f * difference3;
  y[4] = sum1 + 16.0f * sum2 + 0.0625f * sum3;
  y[5] = difference1 + 32.0f * difference2 + 0.03125f * difference3 + m[7];
}

}  // namespace blnet
