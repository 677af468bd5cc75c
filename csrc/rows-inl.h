// Rows of a power of two, from passes. Included by job-inl.h.

namespace onnx_quarot {
namespace {

// Whether passes of rows of R blocks run beside each other: Interleaved, or in turn.
template <std::size_t R, class In, class Out>
constexpr bool kMingled = kInterleaved && !In::paired && !Out::paired && !(kFusedDifference && R == 4);

// Blocks and columns of eight that take turns. A CPU of Zen 1 to 4 looks few instructions ahead: what ends with eight
// stores leaves its arithmetic idle until the next eight values are there. So the last stage of one is also the start
// of the next, pair by pair, in the registers that its results leave.
template <std::size_t R, class In, class Out>
constexpr bool kTakesTurns = kMingled<R, In, Out> && R == kBlockVectors;

template <std::size_t R, class Out, class Next, class V>
ONNX_QUAROT_INLINE void last_stage_and_next(V* x, Out out, std::size_t step, Next next, V one) {
#pragma GCC unroll 64
  for (std::size_t i = 0, j = R / 2; i < R / 2; ++i, ++j) {
    const V a = x[i], b = x[j];
    out.put(i * step, a + b);
    out.put(j * step, difference(a, b, one));
    x[i] = next(i);
    x[j] = next(j);
  }
}

// A block's first stage, in one vector; and those between its first and its last.
template <class In>
struct BlockStart {
  using Vector = typename In::Vector;
  static constexpr std::size_t lanes = sizeof(Vector) / sizeof(Vector{}[0]);
  In in;
  ONNX_QUAROT_INLINE Vector operator()(std::size_t i) const {
    return lane_stage<1>(in.get(i * lanes), LanesOf<Vector>{});
  }
};
template <std::size_t R, class V>
ONNX_QUAROT_INLINE void stages_between(V* x, V one) {
  lane_stages<R, 2>(x);
  butterflies<R, 1, R / 2>(x, one);
}

// `count` blocks, at least one.
template <std::size_t R, class In, class Out, class V>
ONNX_QUAROT_INLINE void blocks_in_turn(In in, Out out, std::size_t count, std::size_t sign_step, V one) {
  constexpr std::size_t lanes = sizeof(V) / sizeof(one[0]), n = R * lanes;
  V x[R];
#pragma GCC unroll 64
  for (std::size_t i = 0; i < R; ++i) x[i] = BlockStart<In>{in}(i);
  for (std::size_t block = 1; block < count; ++block) {
    stages_between<R>(x, one);
    const BlockStart<In> next{in.at(block * n, block * sign_step)};
    last_stage_and_next<R>(x, out.at((block - 1) * n, (block - 1) * sign_step), lanes, next, one);
  }
  stages_between<R>(x, one);
  butterflies<R, R / 2>(x, one);
  out.at((count - 1) * n, (count - 1) * sign_step).template put_all<R>(x, lanes);
}

// Rows of eight blocks from the second on, at least that one, and all columns but the last row's: a block, a column of
// the row before, and so on.
template <class In, class Out, class C, class V>
ONNX_QUAROT_INLINE void rows_in_turn(In in, const Rows<C>& rows, Out out, std::size_t count, std::size_t sign_step,
                                     V one) {
  constexpr std::size_t R = kBlockVectors, lanes = sizeof(V) / sizeof(C), block = R * lanes, n = R * block;
  constexpr std::size_t fused = fused_in_columns(R, false);
  V x[R];
#pragma GCC unroll 64
  for (std::size_t i = 0; i < R; ++i) x[i] = BlockStart<In>{in.at(n, sign_step)}(i);
  for (std::size_t row = 1; row < count; ++row) {
    const Sink<C, Finish::none> to{rows.at(row), nullptr, one};
    const Source<C, false> before{rows.at(row - 1), nullptr};
    typename Out::Loop columns_to(out.at((row - 1) * n, (row - 1) * sign_step));
    for (std::size_t piece = 0; piece < R; ++piece) {
      stages_between<R>(x, one);
      const Source<C, false> column = before.at(piece * lanes);
      last_stage_and_next<R>(x, to.at(piece * block), lanes, [&](std::size_t i) { return column.get(i * block); }, one);
      butterflies<R, 1, R / 2, fused>(x, one);
      const bool row_ends = piece + 1 == R;
      if (row_ends && row + 1 == count) {
        butterflies<R, R / 2, R, fused>(x, one);
        columns_to.at(piece * lanes).template put_all<R>(x, block);
        return;
      }
      const In next = row_ends ? in.at((row + 1) * n, (row + 1) * sign_step)
                               : in.at(row * n, row * sign_step).at((piece + 1) * block);
      last_stage_and_next<R>(x, columns_to.at(piece * lanes), block, BlockStart<In>{next}, one);
    }
  }
}

template <std::size_t R, class In, class Out, class V>
void one_pass_rows(In in, Out out, std::size_t count, std::size_t sign_step, V one) {
  constexpr std::size_t n = R * sizeof(V) / sizeof(one[0]);
  // What a sink finds out about a row would go through memory, vector by vector.
  if constexpr (kTakesTurns<R, In, Out> && std::is_same_v<typename Out::Loop, Out>) {
    if (count != 0) blocks_in_turn<R>(in, out, count, sign_step, one);
  } else {
    for (std::size_t i = 0; i < count; ++i)
      block_pass<R>(in.at(i * n, i * sign_step), out.at(i * n, i * sign_step), one);
  }
}

// A block_pass and, between its instructions, column_passes over as many vectors of the row before. A block waits for
// shuffles and for its own results, columns wait for adders and stores: one after the other, a CPU that looks ahead
// less than a block (Zen 3) finds too little to do meanwhile. R is 2 or 4: more registers there are not.
template <std::size_t R, class In, class Out, class C, class V>
struct Interleaved {
  static constexpr std::size_t lanes = sizeof(V) / sizeof(C), vectors = kBlockVectors;
  static constexpr std::size_t lane_steps = vectors * doublings(1, lanes);
  static constexpr std::size_t pair_steps = vectors / 2 * doublings(1, vectors);
  static constexpr std::size_t block_steps = lane_steps + pair_steps + vectors;
  static constexpr std::size_t column_pairs = R / 2 * doublings(1, R);
  static constexpr std::size_t column_steps = R + column_pairs + 1;
  static constexpr std::size_t total_column_steps = vectors / R * column_steps;

  V one;
  V x[vectors];
  V y[R];
  Sink<C, Finish::none> to;
  Out done;
  In from;
  Source<C, false> before;

  template <std::size_t Pair, std::size_t Half>
  static ONNX_QUAROT_INLINE void butterfly(V* values, V one) {
    constexpr std::size_t i = Pair / Half * 2 * Half + Pair % Half;
    const V a = values[i], b = values[i + Half];
    values[i] = a + b;
    values[i + Half] = difference(a, b, one);
  }
  template <std::size_t Step>
  ONNX_QUAROT_INLINE void block_step() {
    if constexpr (Step < lane_steps) {
      constexpr std::size_t i = Step % vectors;
      if constexpr (Step < vectors) x[i] = from.get(i * lanes);
      x[i] = lane_stage<(1 << Step / vectors)>(x[i], LanesOf<V>{});
    } else if constexpr (Step < lane_steps + pair_steps) {
      constexpr std::size_t pair = Step - lane_steps;
      butterfly<pair % (vectors / 2), std::size_t{1} << pair / (vectors / 2)>(x, one);
    } else {
      constexpr std::size_t i = Step - lane_steps - pair_steps;
      to.put(i * lanes, x[i]);
    }
  }
  template <std::size_t Step, std::size_t End>
  ONNX_QUAROT_INLINE void columns() {
    if constexpr (Step < End) {
      constexpr std::size_t column = Step / column_steps * lanes, i = Step % column_steps;
      if constexpr (i < R) {
        y[i] = before.get(column + i * vectors * lanes);
      } else if constexpr (i < R + column_pairs) {
        butterfly<(i - R) % (R / 2), std::size_t{1} << (i - R) / (R / 2)>(y, one);
      } else {
        done.at(column).template put_all<R>(y, vectors * lanes);
      }
      columns<Step + 1, End>();
    }
  }
  template <std::size_t Step = 0>
  ONNX_QUAROT_INLINE void run() {
    if constexpr (Step < block_steps) {
      block_step<Step>();
      columns<Step * total_column_steps / block_steps, (Step + 1) * total_column_steps / block_steps>();
      run<Step + 1>();
    }
  }
};

// Rows of R blocks. The first pass keeps the arithmetic units busy and the second one loads and stores: the second pass
// of a row runs piece by piece between the pieces of the next row's first pass.
template <std::size_t R, class In, class Out, class C, class V>
void two_pass_rows_between(In in, const Rows<C>& rows, Out out, std::size_t count, std::size_t sign_step, V one) {
  constexpr std::size_t lanes = sizeof(V) / sizeof(C), block = kBlockVectors * lanes, n = R * block;
  constexpr std::size_t width = (Out::paired ? 2 : 1) * lanes, columns = block / width;
  constexpr std::size_t pieces = R < columns ? R : columns;
  const auto row_sink = [&](std::size_t i) { return Sink<C, Finish::none>{rows.at(i), nullptr, one}; };
  if (count == 0) return;
  one_pass_rows<kBlockVectors>(in, row_sink(0), R, block, one);
  if constexpr (kTakesTurns<R, In, Out>) {
    if (count > 1) rows_in_turn(in, rows, out, count, sign_step, one);
  } else {
    for (std::size_t i = 1; i < count; ++i) {
      const In from = in.at(i * n, i * sign_step);
      const Sink<C, Finish::none> to = row_sink(i);
      const Source<C, false> before{rows.at(i - 1), nullptr};
      const Out done = out.at((i - 1) * n, (i - 1) * sign_step);
      if constexpr (kMingled<R, In, Out>) {
        static_assert(R == 2 || R == 4);
        typename Out::Loop columns_to(done);
        const std::size_t share = kBlockVectors / R * lanes;
#pragma GCC unroll 1
        for (std::size_t b = 0, c = 0; b < n; b += block, c += share) {
          Interleaved<R, In, decltype(columns_to.at(c)), C, V> both{
              one, {}, {}, to.at(b), columns_to.at(c), from.at(b), before.at(c)};
          both.run();
        }
      } else {
        std::size_t b = 0, c = 0;
        for (std::size_t piece = 0; piece < pieces; ++piece) {
#pragma GCC unroll 1
          for (std::size_t k = 0; k < R / pieces; ++k, b += block) block_pass<kBlockVectors>(from.at(b), to.at(b), one);
          typename Out::Loop columns_to(done);
#pragma GCC unroll 1
          for (std::size_t k = 0; k < columns / pieces; ++k, c += width)
            column_pass<R>(before.at(c), block, columns_to.at(c), block, one);
        }
      }
    }
  }
  last_pass<R>(Source<C, false>{rows.at(count - 1), nullptr}, out.at((count - 1) * n, (count - 1) * sign_step), block,
               one);
}

// Where the passes of rows are off the boundaries of vectors, each of their stores may touch two cache lines. On Zen 4
// that takes longer than to keep two rows elsewhere between their passes; elsewhere it was not measured.
template <std::size_t R, class In, class Out, class C, class V>
void two_pass_rows(In in, const Rows<C>& rows, Out out, std::size_t count, std::size_t sign_step, V one) {
  constexpr std::size_t n = R * kBlockVectors * sizeof(V) / sizeof(C);
  if constexpr (kInterleaved && kFusedDifference) {
    if (elements_past_boundary(rows.values) != 0) {
      alignas(kScratchAlignment) C aligned[2 * n];
      return two_pass_rows_between<R>(in, Rows<C>{aligned, n, kTwoRows}, out, count, sign_step, one);
    }
  }
  two_pass_rows_between<R>(in, rows, out, count, sign_step, one);
}

// H_n of `count` adjacent rows of n elements, n a power of two and at least a vector. The signs of a row, or what else
// `out` has for each, begin `sign_step` after those of the row before. `rows` is where they are between passes: memory
// of its own, or the rows of `out`.
template <class In, class Out, class C, class V>
void power_rows(In in, const Rows<C>& rows, Out out, std::size_t count, std::size_t sign_step, std::size_t n, V one) {
  static_assert(kBlockVectors == 8 || kBlockVectors == 16);
  static_assert(kMaxRadix == 8 || kMaxRadix == 16 || kMaxRadix == 32);
  constexpr std::size_t lanes = sizeof(V) / sizeof(C), block = kBlockVectors * lanes;
  static_assert(block * kMaxRadix * sizeof(C) <= kTwoRowsBytes);
  if (n <= block) {
    switch (n / lanes) {
      case 1:
        return one_pass_rows<1>(in, out, count, sign_step, one);
      case 2:
        return one_pass_rows<2>(in, out, count, sign_step, one);
      case 4:
        return one_pass_rows<4>(in, out, count, sign_step, one);
      case 8:
        return one_pass_rows<8>(in, out, count, sign_step, one);
      default:
        return one_pass_rows<kBlockVectors>(in, out, count, sign_step, one);
    }
  }
  if (n <= block * kMaxRadix) {
    switch (n / block) {
      case 2:
        return two_pass_rows<2>(in, rows, out, count, sign_step, one);
      case 4:
        return two_pass_rows<4>(in, rows, out, count, sign_step, one);
      case 8:
        return two_pass_rows<8>(in, rows, out, count, sign_step, one);
      case 16:
        if constexpr (kMaxRadix >= 16) return two_pass_rows<16>(in, rows, out, count, sign_step, one);
        [[fallthrough]];
      default:
        return two_pass_rows<kMaxRadix>(in, rows, out, count, sign_step, one);
    }
  }
  const std::size_t radix = last_radix(n, sizeof(C), block), part = n / radix;
  for (std::size_t i = 0; i < count; ++i) {
    C* row = rows.at(i);
    const Sink<C, Finish::none> to{row, nullptr, one};
    power_rows(in.at(i * n, i * sign_step), Rows<C>{row, part, kEveryRow}, to, radix, part, part, one);
    const Source<C, false> from{row, nullptr};
    const Out last = out.at(i * n, i * sign_step);
    if (radix == 8) {
      last_pass<8>(from, last, part, one);
    } else if (radix == 4) {
      last_pass<4>(from, last, part, one);
    } else {
      last_pass<2>(from, last, part, one);
    }
  }
}

}  // namespace
}  // namespace onnx_quarot
