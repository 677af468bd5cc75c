#include "orders.h"

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>

#include "fwht.h"
#include "order_codes.h"
#include "williamson-inl.h"

namespace onnx_quarot {
namespace {

using Matrix = std::vector<std::int8_t>;
using Sequence = std::vector<int>;

// Paley's constructions would go on for ever; a dense step of order K stops being worth it long before this.
constexpr std::size_t kLargestOrder = 1024;

struct PrimePower {
  std::size_t prime = 0;  // 0: not a prime power
  std::size_t exponent = 0;
};

PrimePower prime_power(std::size_t q) {
  for (std::size_t p = 2; p * p <= q; ++p) {
    if (q % p != 0) continue;
    std::size_t exponent = 0;
    for (; q % p == 0; q /= p) ++exponent;
    return q == 1 ? PrimePower{p, exponent} : PrimePower{};
  }
  return q > 1 ? PrimePower{q, 1} : PrimePower{};
}

// GF(q), its elements numbered by their digits in base p.
class Field {
 public:
  explicit Field(std::size_t q) : q_(q), p_(prime_power(q).prime), k_(prime_power(q).exponent) {
    if (k_ > 1) find_primitive_polynomial();
  }

  std::size_t subtract(std::size_t a, std::size_t b) const {
    std::size_t result = 0, unit = 1;
    for (std::size_t i = 0; i < k_; ++i, unit *= p_, a /= p_, b /= p_) result += (a % p_ + p_ - b % p_) % p_ * unit;
    return result;
  }

  // The quadratic character of every element: 0, +1 for squares, -1.
  std::vector<int> character() const {
    std::vector<int> chi(q_, -1);
    chi[0] = 0;
    if (k_ == 1) {
      for (std::size_t i = 1; i < q_; ++i) chi[i * i % q_] = 1;
      return chi;
    }
    std::size_t power = 1;  // of the generator x; its even powers are the squares
    for (std::size_t i = 0; i + 1 < q_; ++i, power = times_x(power)) chi[power] = i % 2 == 0 ? 1 : -1;
    return chi;
  }

 private:
  // a x modulo x^k + sum modulus_[i] x^i.
  std::size_t times_x(std::size_t a) const {
    const std::size_t top = a / (q_ / p_);
    std::size_t shifted = a % (q_ / p_) * p_, result = 0, unit = 1;
    for (std::size_t i = 0; i < k_; ++i, unit *= p_, shifted /= p_) {
      result += (shifted % p_ + (p_ - modulus_[i]) * top) % p_ * unit;
    }
    return result;
  }

  // The first monic polynomial for which x generates the multiplicative group.
  void find_primitive_polynomial() {
    for (std::size_t candidate = 1; candidate < q_; ++candidate) {
      modulus_.assign(k_, 0);
      std::size_t rest = candidate;
      for (std::size_t i = 0; i < k_; ++i, rest /= p_) modulus_[i] = rest % p_;
      std::size_t length = 1, power = times_x(1);
      for (; power > 1 && length < q_; power = times_x(power)) ++length;
      if (power == 1 && length == q_ - 1) return;
    }
  }

  std::size_t q_, p_, k_;
  std::vector<std::size_t> modulus_;
};

// Bordered Jacobsthal matrix of order q + 1: zero diagonal, first row +1, first column `column`, Q[i][j] = chi(i - j).
Matrix conference(std::size_t q, std::int8_t column) {
  const Field field(q);
  const std::vector<int> chi = field.character();
  const std::size_t n = q + 1;
  Matrix s(n * n, 0);
  for (std::size_t i = 1; i < n; ++i) {
    s[i] = 1;
    s[i * n] = column;
    for (std::size_t j = 1; j < n; ++j) s[i * n + j] = static_cast<std::int8_t>(chi[field.subtract(i - 1, j - 1)]);
  }
  return s;
}

bool has_paley1(std::size_t k) { return k % 4 == 0 && prime_power(k - 1).prime != 0; }
bool has_paley2(std::size_t k) { return k % 4 == 0 && (k / 2 - 1) % 4 == 1 && prime_power(k / 2 - 1).prime != 0; }

Matrix paley1(std::size_t k) {
  Matrix h = conference(k - 1, -1);
  for (std::size_t i = 0; i < k; ++i) h[i * k + i] = 1;
  return h;
}

// Each +-1 of a symmetric conference matrix becomes +-[[1, 1], [1, -1]], each 0 becomes [[1, -1], [-1, -1]].
Matrix paley2(std::size_t k) {
  const std::size_t n = k / 2;
  const Matrix s = conference(n - 1, 1);
  Matrix h(k * k);
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < n; ++j) {
      const int v = int{s[i * n + j]};
      const int cell[4] = {v != 0 ? v : 1, v != 0 ? v : -1, v != 0 ? v : -1, v != 0 ? -v : -1};
      for (std::size_t c = 0; c < 4; ++c) h[(2 * i + c / 2) * k + 2 * j + c % 2] = static_cast<std::int8_t>(cell[c]);
    }
  }
  return h;
}

Matrix doubled(const Matrix& h, std::size_t n) {
  const std::size_t k = 2 * n;
  Matrix out(k * k);
  for (std::size_t i = 0; i < k; ++i) {
    for (std::size_t j = 0; j < k; ++j) {
      const int v = int{h[i % n * n + j % n]};
      out[i * k + j] = static_cast<std::int8_t>(i >= n && j >= n ? -v : v);
    }
  }
  return out;
}

Matrix williamson(const WilliamsonSeed& seed) {
  const std::size_t k = 4 * seed.t;
  Matrix h;
  h.reserve(k * k);
  for (std::size_t i = 0; i < k; ++i) {
    for (std::size_t j = 0; j < k; ++j) h.push_back(static_cast<std::int8_t>(williamson_entry(seed, i, j)));
  }
  return h;
}

// The Goethals-Seidel array of the circulants with first rows a, b, c, d. R reverses columns.
//   [A, BR, CR, DR], [-BR, A, D'R, -C'R], [-CR, -D'R, A, B'R], [-DR, C'R, -B'R, A]
Matrix goethals_seidel(const Sequence (&rows)[4]) {
  constexpr int which[4][4] = {{0, 1, 2, 3}, {1, 0, 3, 2}, {2, 3, 0, 1}, {3, 2, 1, 0}};
  constexpr int sign[4][4] = {{1, 1, 1, 1}, {-1, 1, 1, -1}, {-1, -1, 1, 1}, {-1, 1, -1, 1}};
  const std::size_t t = rows[0].size(), k = 4 * t;
  Matrix h(k * k);
  for (std::size_t i = 0; i < k; ++i) {
    for (std::size_t j = 0; j < k; ++j) {
      const std::size_t bi = i / t, bj = j / t, r = i % t;
      const bool diagonal = bi == bj, transposed = bi > 0 && bj > 0 && !diagonal;
      const std::size_t c = diagonal ? j % t : t - 1 - j % t;
      const std::size_t shift = transposed ? (r + t - c) % t : (c + t - r) % t;
      h[i * k + j] = static_cast<std::int8_t>(sign[bi][bj] * rows[which[bi][bj]][shift]);
    }
  }
  return h;
}

// Circulants constant on the orbits of a subgroup of the units modulo t; bit i of a mask: -1 on the i-th orbit.
struct OrbitSeed {
  std::size_t t;
  std::vector<std::size_t> subgroup;
  std::uint32_t masks[4];
};

const std::vector<OrbitSeed>& orbit_seeds() {
  static const std::vector<OrbitSeed> seeds = {
      {39, {1, 14, 16, 22, 29, 35}, {157, 117, 244, 198}},
      {43, {1, 4, 11, 16, 21, 35, 41}, {7, 7, 13, 60}},
  };
  return seeds;
}

const OrbitSeed* find_orbit_seed(std::size_t k) {
  for (const OrbitSeed& seed : orbit_seeds()) {
    if (4 * seed.t == k) return &seed;
  }
  return nullptr;
}

Matrix orbit_matrix(const OrbitSeed& seed) {
  Sequence rows[4];
  for (std::size_t r = 0; r < 4; ++r) {
    rows[r].assign(seed.t, 0);
    rows[r][0] = 1;
    unsigned orbit = 0;
    for (std::size_t x = 1; x < seed.t; ++x) {
      if (rows[r][x] != 0) continue;
      const int value = ((seed.masks[r] >> orbit++) & 1u) != 0 ? -1 : 1;
      for (const std::size_t s : seed.subgroup) rows[r][x * s % seed.t] = value;
    }
  }
  return goethals_seidel(rows);
}

// Order 188 = 4 (3 * 16 - 1): a Turyn-type quadruple of lengths 16, 16, 16, 15 gives T-sequences of length 47. Bit i of
// a word: -1 at i.
constexpr std::size_t kTurynLength = 16;
constexpr std::size_t kTurynOrder = 4 * (3 * kTurynLength - 1);

Matrix turyn_matrix() {
  constexpr std::uint32_t words[4] = {0x7728, 0x282c, 0xe216, 0x5064};
  constexpr std::size_t n = kTurynLength, t = 3 * n - 1;
  const auto value = [&words](std::size_t word, std::size_t i) { return ((words[word] >> i) & 1u) != 0 ? -1 : 1; };
  Sequence parts[4];  // four sequences of 0, +-1 with disjoint supports: Z, W, (X + Y) / 2, (X - Y) / 2
  for (Sequence& part : parts) part.assign(t, 0);
  for (std::size_t i = 0; i < n; ++i) {
    parts[0][i] = value(2, i);
    if (i + 1 < n) parts[1][n + i] = value(3, i);
    parts[2][2 * n - 1 + i] = (value(0, i) + value(1, i)) / 2;
    parts[3][2 * n - 1 + i] = (value(0, i) - value(1, i)) / 2;
  }
  constexpr int combine[4][4] = {{1, 1, 1, 1}, {-1, 1, 1, -1}, {-1, -1, 1, 1}, {-1, 1, -1, 1}};
  Sequence rows[4];
  for (std::size_t r = 0; r < 4; ++r) {
    rows[r].assign(t, 0);
    for (std::size_t p = 0; p < 4; ++p) {
      for (std::size_t i = 0; i < t; ++i) rows[r][i] += combine[r][p] * parts[p][i];
    }
  }
  return goethals_seidel(rows);
}

// The construction of an order: Paley's second one where there is a choice, because its step takes half the work.
enum class Construction { none, sylvester, williamson, paley2, orbits, turyn, paley1, doubled };

Construction construction(std::size_t k) {
  if (k == 0 || k > kLargestOrder) return Construction::none;
  if ((k & (k - 1)) == 0) return Construction::sylvester;
  if (k % 4 != 0) return Construction::none;
  const bool unrolled = k % 8 == 4 && k <= kLargestUnrolledOrder && find_williamson(k / 4) != nullptr;
  if (unrolled) return Construction::williamson;
  if (has_paley2(k)) return Construction::paley2;
  if (k % 8 == 4 && find_williamson(k / 4) != nullptr) return Construction::williamson;
  if (find_orbit_seed(k) != nullptr) return Construction::orbits;
  if (k == kTurynOrder) return Construction::turyn;
  if (has_paley1(k)) return Construction::paley1;
  if (k % 8 == 0 && construction(k / 2) != Construction::none) return Construction::doubled;
  return Construction::none;
}

Matrix construct(std::size_t k) {
  switch (construction(k)) {
    case Construction::williamson:
      return williamson(*find_williamson(k / 4));
    case Construction::paley2:
      return paley2(k);
    case Construction::orbits:
      return orbit_matrix(*find_orbit_seed(k));
    case Construction::turyn:
      return turyn_matrix();
    case Construction::paley1:
      return paley1(k);
    default:
      return k == 1 ? Matrix{1} : doubled(construct(k / 2), k / 2);
  }
}

// The smallest order with this odd part, 0 if there is none.
std::size_t smallest_order(std::size_t odd) {
  for (std::size_t k = 4 * odd; k <= kLargestOrder; k *= 2) {
    if (construction(k) != Construction::none) return k;
  }
  return 0;
}

std::size_t sum(const std::vector<std::size_t>& values) {
  return std::accumulate(values.begin(), values.end(), std::size_t{0});
}

// k as a product of smallest orders, from `least` on, with the smallest sum; empty if there is none. k is not a power
// of two.
std::vector<std::size_t> product(std::size_t k, std::size_t least) {
  std::size_t odd = k;
  while (odd % 2 == 0) odd /= 2;
  std::vector<std::size_t> best;
  for (std::size_t divisor = 3; divisor <= odd; divisor += 2) {
    if (odd % divisor != 0) continue;
    const std::size_t first = smallest_order(divisor);
    if (first < least || first == 0 || k % first != 0) continue;
    std::vector<std::size_t> found = {first};
    if (first != k) {
      if (odd == divisor) continue;
      const std::vector<std::size_t> rest = product(k / first, first);
      if (rest.empty()) continue;
      found.insert(found.end(), rest.begin(), rest.end());
    }
    if (best.empty() || sum(found) < sum(best)) best = std::move(found);
  }
  return best;
}

// What is made is kept until the end of the process.
struct Store {
  std::mutex mutex;
  std::map<std::size_t, std::unique_ptr<const Order>> orders;
  struct Codes {
    std::vector<std::uint64_t> one_column, two_columns;
  };
  std::map<std::size_t, std::array<Codes, 2>> codes;  // by order: of H and of H^T
};

OrderStep make_step(Store& store, std::size_t k, bool transpose) {
  const bool halved = construction(k) == Construction::paley2;
  std::array<Store::Codes, 2>& codes = store.codes[k];
  if (codes[0].one_column.empty()) {
    const Matrix h = construct(k);
    const auto made = [&](std::size_t row, std::size_t column) {
      return Store::Codes{order_codes(h.data(), k, row, column, 1, 1), order_codes(h.data(), k, row, column, 1, 2)};
    };
    if (halved) {
      codes[0] = codes[1] = {order_codes(h.data(), k / 2, 2 * k, 2, 2, 1), {}};
    } else {
      codes = {made(k, 1), made(1, k)};
    }
  }
  const Store::Codes& found = codes[transpose ? 1 : 0];
  return {k, {found.one_column.data(), found.two_columns.data()}, halved};
}

}  // namespace

std::vector<std::size_t> order_factors(std::size_t k) {
  if (k == 0) return {};
  if ((k & (k - 1)) == 0) return k <= kLargestOrder ? std::vector<std::size_t>{k} : std::vector<std::size_t>{};
  std::vector<std::size_t> factors = product(k, 0);
  if (!factors.empty()) return factors;
  return construction(k) != Construction::none ? std::vector<std::size_t>{k} : std::vector<std::size_t>{};
}

const Order& order(std::size_t k) {
  static Store store;
  const std::lock_guard<std::mutex> lock(store.mutex);
  std::unique_ptr<const Order>& entry = store.orders[k];
  if (entry == nullptr) {
    auto fresh = std::make_unique<Order>();
    fresh->k = k;
    fresh->factors = order_factors(k);
    if (fresh->factors.empty()) {
      throw UnsupportedOrder("order " + std::to_string(k) + ": no Hadamard matrix of this order is available");
    }
    for (const std::size_t factor : fresh->factors) {
      if (construction(factor) == Construction::sylvester) continue;
      fresh->steps.push_back(make_step(store, factor, false));
      fresh->steps_transposed.push_back(make_step(store, factor, true));
    }
    entry = std::move(fresh);
  }
  return *entry;
}

std::vector<std::int8_t> order_matrix(std::size_t k) {
  Matrix whole = {1};
  std::size_t n = 1;
  for (const std::size_t factor : order(k).factors) {
    const Matrix h = construct(factor);
    const std::size_t m = n * factor;
    Matrix next(m * m);
    for (std::size_t i = 0; i < m; ++i) {
      for (std::size_t j = 0; j < m; ++j) {
        next[i * m + j] =
            static_cast<std::int8_t>(whole[i / factor * n + j / factor] * h[i % factor * factor + j % factor]);
      }
    }
    whole = std::move(next);
    n = m;
  }
  return whole;
}

}  // namespace onnx_quarot
