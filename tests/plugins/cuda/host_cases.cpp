// What the emulated GPU must compute, one case a name: `host_cases NAME` exits 0 when all is as the PTX manual says.
// Fragments are built here from the manual's formulas, products by the textbook loop.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <utility>

#include "gpu.h"

namespace {

constexpr int kLanes = 32;

struct Buffers {
  uint32_t* in;
  uint32_t* out;
};

int failures = 0;

void expect(bool holds, const char* what, int i) {
  if (!holds && ++failures < 10) std::printf("%s: wrong at %d\n", what, i);
}

template <class Args>
void launch(void (*kernel)(Args), gpu::Dim grid, int threads, size_t shared_bytes, const Args& args) {
  const char* reason = gpu::launch(kernel, grid, threads, shared_bytes, nullptr, args);
  if (reason) std::printf("did not start: %s\n", reason), ++failures;
}

uint32_t random_bits() {
  static uint64_t state = 0x9E3779B97F4A7C15u;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return static_cast<uint32_t>(state >> 16);
}

// ---- Products. A is 16 x K, B is K x 8; a register holds kPack consecutive elements of K.

template <int kInner>
struct Product {
  float a[16][kInner], b[kInner][8], c[16][8], d[16][8];
};

template <int kInner>
struct ProductArgs {
  Product<kInner>* p;
};

template <int kPack>
uint32_t pack(const float (&element)[kPack]) {
  uint32_t word = 0;
  for (int i = 0; i < kPack; ++i) {
    const uint32_t bits =
        kPack == 2 ? gpu::to_half(element[i]).bits : static_cast<uint32_t>(static_cast<int>(element[i]));
    word |= (bits & (0xFFFFFFFFu >> (32 - 32 / kPack))) << (32 / kPack * i);
  }
  return word;
}

// PTX manual, "Matrix fragments for mma": group = lane / 4, thread in group = lane % 4. Of A, element i of a lane is
// in row group + 8 * (word odd) and column kPack * (thread) + i % kPack + K/2 * (word >= 2).
template <int kInner, class D, class Multiply>
void product(const ProductArgs<kInner>& args, Multiply multiply) {
  constexpr int kPack = kInner / 8;
  const int group = gpu::lane() >> 2, member = gpu::lane() & 3;
  Product<kInner>& p = *args.p;
  uint32_t a[4], b[2];
  for (int word = 0; word < 4; ++word) {
    float element[kPack];
    for (int i = 0; i < kPack; ++i) element[i] = p.a[group + word % 2 * 8][kPack * member + i + word / 2 * kInner / 2];
    a[word] = pack(element);
  }
  for (int word = 0; word < 2; ++word) {
    float element[kPack];
    for (int i = 0; i < kPack; ++i) element[i] = p.b[kPack * member + i + word * kInner / 2][group];
    b[word] = pack(element);
  }
  D d[4];
  for (int i = 0; i < 4; ++i) d[i] = static_cast<D>(p.c[group + i / 2 * 8][2 * member + i % 2]);
  multiply(d, a, b);
  for (int i = 0; i < 4; ++i) p.d[group + i / 2 * 8][2 * member + i % 2] = static_cast<float>(d[i]);
}

DLLMC_KERNEL(32, 1) void int4_product(DLLMC_PARAM ProductArgs<64> args) {
  product<64, int32_t>(args, [](auto& d, auto& a, auto& b) { gpu::mma_int4(d, a, b); });
}
DLLMC_KERNEL(32, 1) void int8_product(DLLMC_PARAM ProductArgs<32> args) {
  product<32, int32_t>(args, [](auto& d, auto& a, auto& b) { gpu::mma_int8(d, a, b); });
}
DLLMC_KERNEL(32, 1) void half_product(DLLMC_PARAM ProductArgs<16> args) {
  product<16, float>(args, [](auto& d, auto& a, auto& b) { gpu::mma_half(d, a, b); });
}

template <int kInner, class Draw>
void compare_product(void (*kernel)(ProductArgs<kInner>), Draw draw) {
  Product<kInner> p;
  for (auto& row : p.a)
    for (float& x : row) x = draw();
  for (auto& row : p.b)
    for (float& x : row) x = draw();
  for (auto& row : p.c)
    for (float& x : row) x = draw();
  launch(kernel, {1}, kLanes, 0, ProductArgs<kInner>{&p});
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      double sum = p.c[m][n];
      for (int k = 0; k < kInner; ++k) sum += static_cast<double>(p.a[m][k]) * p.b[k][n];
      expect(p.d[m][n] == static_cast<float>(sum), "product", 8 * m + n);
    }
  }
}

void mma_int4() {
  compare_product(int4_product, [] { return static_cast<float>(random_bits() % 16) - 8; });
}
void mma_int8() {
  compare_product(int8_product, [] { return static_cast<float>(random_bits() % 256) - 128; });
}
void mma_half() {  // sums of such halves are exact in float64
  compare_product(half_product, [] { return (static_cast<float>(random_bits() % 2048) - 1024) / 256; });
}

// ---- Matrices out of shared memory.

template <bool kTransposed>
DLLMC_KERNEL(32, 1)
void read_matrices(DLLMC_PARAM Buffers args) {
  auto* rows = reinterpret_cast<uint32_t*>(gpu::shared());  // 32 rows of 16 bytes, 32 bytes apart
  for (int i = 0; i < 4; ++i) rows[8 * gpu::lane() + i] = args.in[4 * gpu::lane() + i];
  gpu::sync_warp();
  uint32_t r[4];
  const void* row = rows + 8 * gpu::lane();
  if constexpr (kTransposed) {
    gpu::load_matrices_transposed(r, row);
  } else {
    gpu::load_matrices(r, row);
  }
  for (int i = 0; i < 4; ++i) args.out[4 * gpu::lane() + i] = r[i];
}

template <bool kTransposed>
void compare_matrices() {
  uint16_t in[4][8][8];
  uint32_t out[kLanes][4];
  for (auto& matrix : in)
    for (auto& row : matrix)
      for (auto& x : row) x = static_cast<uint16_t>(random_bits());
  launch(read_matrices<kTransposed>, {1}, kLanes, kLanes * 32, Buffers{reinterpret_cast<uint32_t*>(in), out[0]});
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        const int row = lane / 4, column = 2 * (lane % 4) + half;
        const uint16_t expected = kTransposed ? in[i][column][row] : in[i][row][column];
        expect((out[lane][i] >> 16 * half & 0xFFFFu) == expected, "matrix", lane);
      }
    }
  }
}

// ---- What threads tell one another.

DLLMC_KERNEL(64, 1) void exchange(DLLMC_PARAM Buffers args) {
  const uint32_t mine = args.in[gpu::thread()];
  uint32_t* out = args.out + 4 * gpu::thread();
  out[0] = gpu::shuffle(mine, (gpu::lane() * 7 + 3) % 32);
  out[1] = gpu::shuffle_xor(mine, 5);
  out[2] = gpu::ballot(mine % 3 == 0);
  out[3] = static_cast<uint32_t>(gpu::shuffle(static_cast<double>(mine), 31));
}

void shuffles() {
  uint32_t in[64], out[64][4];
  for (auto& x : in) x = random_bits();
  launch(exchange, {1}, 64, 0, Buffers{in, out[0]});
  for (int i = 0; i < 64; ++i) {
    const int base = i / 32 * 32, lane = i % 32;
    uint32_t votes = 0;
    for (int j = 0; j < 32; ++j) votes |= (in[base + j] % 3 == 0 ? 1u : 0u) << j;
    expect(out[i][0] == in[base + (lane * 7 + 3) % 32], "shuffle", i);
    expect(out[i][1] == in[base + (lane ^ 5)], "shuffle_xor", i);
    expect(out[i][2] == votes, "ballot", i);
    expect(out[i][3] == in[base + 31], "shuffle of a double", i);
  }
}

// Threads shift values round the block through shared memory, whichever runs first.
DLLMC_KERNEL(128, 1) void pass_round(DLLMC_PARAM Buffers args) {
  auto* shared = reinterpret_cast<uint32_t*>(gpu::shared());
  const int n = gpu::num_threads();
  uint32_t value = args.in[gpu::thread()];
  for (int step = 0; step < 3; ++step) {
    shared[gpu::thread()] = value;
    gpu::sync_block();
    value = shared[(gpu::thread() + 33) % n];
    gpu::sync_block();
  }
  const int half = gpu::warp() / 2;  // two barriers of 64 threads at once
  shared[gpu::thread()] = value;
  gpu::sync_some(1 + half, 64);
  args.out[(gpu::block_y() * gpu::grid_x() + gpu::block_x()) * n + gpu::thread()] = shared[gpu::thread() ^ 32];
}

void barriers() {
  uint32_t in[128], out[6][128];
  for (auto& x : in) x = random_bits();
  launch(pass_round, {3, 2}, 128, sizeof(in), Buffers{in, out[0]});
  for (int i = 0; i < 6 * 128; ++i) {
    expect(out[i / 128][i % 128] == in[((i % 128 ^ 32) + 99) % 128], "barrier", i);
  }
}

DLLMC_KERNEL(64, 1) void count_up(DLLMC_PARAM Buffers args) {
  auto* count = reinterpret_cast<int*>(gpu::shared());
  if (gpu::thread() == 0) *count = 0;
  gpu::sync_block();
  const int turn = 63 - gpu::thread();  // the last thread goes first
  gpu::host::wait_until([&] { return *count == turn; }, "turn");
  args.out[gpu::thread()] = static_cast<uint32_t>((*count)++);
}

void waiting_until() {
  uint32_t out[64];
  launch(count_up, {2}, 64, 4, Buffers{nullptr, out});
  for (int i = 0; i < 64; ++i) expect(out[i] == static_cast<uint32_t>(63 - i), "turn", i);
}

// ---- Asynchronous copies: two groups, the second still under way when the first is read.

template <int kPending>
DLLMC_KERNEL(32, 1)
void copy_groups(DLLMC_PARAM Buffers args) {
  uint32_t* mine = reinterpret_cast<uint32_t*>(gpu::shared()) + 8 * gpu::lane();
  gpu::copy_async(mine, args.in + 4 * gpu::lane());
  gpu::commit_copies();
  gpu::copy_async(mine + 4, args.in, gpu::lane() % 2 == 0);
  gpu::commit_copies();
  gpu::wait_copies<kPending>();
  for (int i = 0; i < 8; ++i) args.out[8 * gpu::lane() + i] = mine[i];
}

template <int kPending>
void copies() {
  alignas(16) uint32_t in[128];
  uint32_t out[32][8];
  for (auto& x : in) x = random_bits();
  launch(copy_groups<kPending>, {2}, kLanes, 1024, Buffers{in, out[0]});
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t second = kPending > 0 ? 0xA5A5A5A5u : lane % 2 == 0 ? in[i] : 0u;
      expect(out[lane][i] == (kPending > 1 ? 0xA5A5A5A5u : in[4 * lane + i]), "first group", lane);
      expect(out[lane][4 + i] == second, "second group", lane);
    }
  }
}

// Memory reused while a copy to it is under way, which lands behind the barrier for all that is known.
template <int kPending>
DLLMC_KERNEL(32, 1)
void reuse(DLLMC_PARAM Buffers args) {
  uint32_t* mine = reinterpret_cast<uint32_t*>(gpu::shared()) + 4 * gpu::lane();
  gpu::copy_async(mine, args.in);
  gpu::commit_copies();
  gpu::wait_copies<kPending>();
  mine[0] = 7u;
  gpu::sync_block();
  args.out[gpu::lane()] = mine[0];
}

void reused_memory() {
  alignas(16) uint32_t in[4] = {};
  uint32_t out[32];
  launch(reuse<0>, {1}, kLanes, 512, Buffers{in, out});
  for (int lane = 0; lane < kLanes; ++lane) expect(out[lane] == 7u, "waited for", lane);
  launch(reuse<1>, {1}, kLanes, 512, Buffers{in, out});
  for (int lane = 0; lane < kLanes; ++lane) expect(out[lane] == 0xA5A5A5A5u, "under way", lane);
}

// ---- Numbers.

void halves() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {  // every half, against its definition
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double sign = bits & 0x8000u ? -1 : 1;
    const double value = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    const float f = gpu::to_float(gpu::Half{static_cast<uint16_t>(bits)});
    if (exponent == 31) {
      expect(fraction ? std::isnan(f) : f == sign * INFINITY, "half", static_cast<int>(bits));
      if (fraction) expect(std::isnan(gpu::to_float(gpu::to_half(f))), "NaN", static_cast<int>(bits));
    } else {
      expect(f == sign * value && std::signbit(f) == (sign < 0), "half", static_cast<int>(bits));
    }
    if (exponent != 31 || !fraction) expect(gpu::to_half(f).bits == bits, "round trip", static_cast<int>(bits));
  }
  for (uint32_t bits = 0; bits < 0x7C00; ++bits) {  // between neighbours: the nearer one, in the middle the even one
    const double low = gpu::to_float(gpu::Half{static_cast<uint16_t>(bits)});
    const double high = bits == 0x7BFF ? 65536 : gpu::to_float(gpu::Half{static_cast<uint16_t>(bits + 1)});
    const float middle = static_cast<float>((low + high) / 2);
    expect(gpu::to_half(middle).bits == bits + (bits & 1), "middle", static_cast<int>(bits));
    expect(gpu::to_half(std::nextafter(middle, 0.0f)).bits == bits, "below", static_cast<int>(bits));
    expect(gpu::to_half(std::nextafter(middle, 1e9f)).bits == bits + 1, "above", static_cast<int>(bits));
  }
  expect(gpu::to_half(1e30f).bits == 0x7C00 && gpu::to_half(-1e30f).bits == 0xFC00, "infinite", 0);
  expect(gpu::to_half(1e-30f).bits == 0 && gpu::to_half(-1e-30f).bits == 0x8000, "zero", 0);
  const uint32_t pair = gpu::pack_halves(1.5f, -2.0f);
  expect(gpu::low_half(pair) == 1.5f && gpu::high_half(pair) == -2.0f && pair == 0xC0003E00u, "pair", 0);
}

void numbers() {
  expect(gpu::permute_bytes(0x33221100u, 0x77665544u, 0x6420u) == 0x66442200u, "even bytes", 0);
  expect(gpu::permute_bytes(0x33221100u, 0x77665544u, 0x7531u) == 0x77553311u, "odd bytes", 0);
  expect(gpu::permute_bytes(0x00008000u, 0u, 0x8981u) == 0x00FF0080u, "signs", 0);
  const std::pair<float, int32_t> integers[] = {{0.5f, 0},          {1.5f, 2},   {2.5f, 2},
                                                {-0.5f, 0},         {-1.5f, -2}, {3e9f, INT32_MAX},
                                                {-3e9f, INT32_MIN}, {NAN, 0},    {2147483520.0f, 2147483520}};
  for (const auto& [f, i] : integers) expect(gpu::to_int(f) == i, "to_int", i);
  expect(gpu::fma(16777217.0f, 3.0f, -50331648.0f) == std::fma(16777217.0f, 3.0f, -50331648.0f), "fma", 0);
  volatile float a = 1 + 0x1p-12f, c = -1;  // a * a + c differs when the product is not rounded
  expect(gpu::add(gpu::mul(a, a), c) == 0x1p-11f, "mul then add", 0);
  expect(gpu::fma(a, a, c) == 0x1p-11f + 0x1p-24f, "fused", 0);
}

// A missing barrier is no fault here, but its wrong value shows: in a block that runs its threads in the other order.
template <bool kForward>
DLLMC_KERNEL(64, 1)
void race(DLLMC_PARAM Buffers args) {
  auto* shared = reinterpret_cast<uint32_t*>(gpu::shared());
  shared[gpu::thread()] = 1;
  args.out[64 * gpu::block_x() + gpu::thread()] = shared[kForward ? gpu::thread() ^ 32 : gpu::thread()];
}

void races() {
  uint32_t out[2][64];
  launch(race<true>, {2}, 64, 1024, Buffers{nullptr, out[0]});
  for (int i = 0; i < 64; ++i) {
    expect(out[0][i] == (i < 32 ? 0xFFFFFFFFu : 1u), "block 0 goes forward", i);
    expect(out[1][i] == (i < 32 ? 1u : 0xFFFFFFFFu), "block 1 goes back", i);
  }
}

void refusals() {
  const auto start = [](gpu::Dim grid, int threads, size_t shared_bytes) {
    return gpu::launch(race<false>, grid, threads, shared_bytes, nullptr, Buffers{}) != nullptr;
  };
  expect(start({0}, 64, 0), "empty grid", 0);
  expect(start({1, 65536}, 64, 0), "tall grid", 0);
  expect(start({1}, 1056, 0), "many threads", 0);
  expect(start({1}, 64, 227 * 1024 + 1), "much shared memory", 0);
  gpu::host::Block::of_this_thread().max_shared_bytes = 1000;
  expect(start({1}, 64, 1001), "more shared memory than this GPU has", 0);
}

}  // namespace

int main(int count, char** words) {
  const std::map<std::string, void (*)()> cases = {
      {"mma_int4", mma_int4},
      {"mma_int8", mma_int8},
      {"mma_half", mma_half},
      {"load_matrices", compare_matrices<false>},
      {"load_matrices_transposed", compare_matrices<true>},
      {"shuffles", shuffles},
      {"barriers", barriers},
      {"waiting_until", waiting_until},
      {"copies_all_done", copies<0>},
      {"copies_one_pending", copies<1>},
      {"copies_not_waited_for", copies<2>},
      {"reused_memory", reused_memory},
      {"halves", halves},
      {"numbers", numbers},
      {"races", races},
      {"refusals", refusals},
  };
  const auto found = cases.find(count == 2 ? words[1] : "");
  if (found == cases.end()) return std::printf("expected the name of a case\n"), 2;
  found->second();
  return failures ? 1 : 0;
}
