// DllmcRotate: y[m, b] = x[m, perm][b] blocks[b] for blocks of c channels, in float32 (plugins/rotate.py).
//
// Tile: a block of threads owns one channel block and walks through tiles of about 8192 / c rows, gathered into shared
// memory as float32 once (the permutation is kept there, too). A thread makes 8 rows x 4 columns: 32 sums stand against
// a 16-byte load of the matrix, which is the same for all tiles and so comes from L1, and a quarter of 8 loads of x.
// Those are 16 bytes of 8 rows, one address a warp where c is 128 and up to 8 where c is less: rows that differ by 1
// are a pitch of c + 4 floats apart, so no bank is asked twice. Neighbouring lanes store neighbouring columns, 16 bytes
// each (8 as float16). At c 128 it is limited by float32 arithmetic (2 c operations a value), below 32 by memory.
#include <cstring>

#include "gpu.h"
#include "kernels.h"

namespace dllmc {
namespace {

constexpr int kThreads = 256, kNaiveThreads = 128;
constexpr int kOctet = 8;  // rows of a thread, `octets` apart

DLLMC_DEVICE float value(const gpu::Vec& v, int i) {
  float x;
  memcpy(&x, &v.v[i], 4);
  return x;
}

DLLMC_DEVICE float read(const void* p, Type type, int64_t i) {
  return type == Type::kFloat32 ? static_cast<const float*>(p)[i] : gpu::to_float(static_cast<const gpu::Half*>(p)[i]);
}

// Channel k of the permuted x. A model's permutation is not to be trusted with what it points at.
DLLMC_DEVICE int source_channel(const RotateArgs& p, int k) {
  const int64_t channel = p.perm[k];
  if (static_cast<uint64_t>(channel) >= static_cast<uint64_t>(p.inner)) gpu::trap();
  return static_cast<int>(channel);
}

struct RotateTile {
  RotateArgs r;
  int32_t octets;  // of a tile's rows
  int32_t pitch;   // floats from row to row of the tile
};

DLLMC_DEVICE void gather(const RotateTile& p, int64_t first_row, const int* channels, float* tile) {
  const int rows = p.octets * kOctet, c = p.r.block;
  for (int i = gpu::thread(); i < rows * c; i += gpu::num_threads()) {
    const int64_t m = first_row + i / c;
    tile[i / c * p.pitch + i % c] = m < p.r.rows ? read(p.r.x, p.r.x_type, m * p.r.inner + channels[i % c]) : 0.0f;
  }
}

DLLMC_DEVICE void multiply(const RotateTile& p, const float* matrix, const float* row, float (&y)[kOctet][4]) {
  for (int k = 0; k < p.r.block; k += 4) {
    gpu::Vec x[kOctet];
    DLLMC_UNROLL
    for (int i = 0; i < kOctet; ++i) x[i] = *reinterpret_cast<const gpu::Vec*>(row + i * p.octets * p.pitch + k);
    DLLMC_UNROLL
    for (int j = 0; j < 4; ++j) {
      const gpu::Vec factors = gpu::load_shared_reads(matrix + (k + j) * p.r.block);
      DLLMC_UNROLL
      for (int i = 0; i < kOctet; ++i) {
        DLLMC_UNROLL
        for (int n = 0; n < 4; ++n) y[i][n] = gpu::fma(value(x[i], j), value(factors, n), y[i][n]);
      }
    }
  }
}

DLLMC_DEVICE void store(const RotateArgs& p, const float (&y)[4], int64_t i) {
  if (p.y_type == Type::kFloat32) {
    gpu::Vec out;
    memcpy(&out, y, 16);
    *reinterpret_cast<gpu::Vec*>(static_cast<float*>(p.y) + i) = out;
  } else {
    uint32_t* words = static_cast<uint32_t*>(p.y) + i / 2;
    words[0] = gpu::pack_halves(y[0], y[1]);
    words[1] = gpu::pack_halves(y[2], y[3]);
  }
}

DLLMC_KERNEL(kThreads, 2)
void rotate_tile(DLLMC_PARAM RotateTile p) {
  const int c = p.r.block, quads = c / 4, first_channel = gpu::block_x() * c;
  float* tile = reinterpret_cast<float*>(gpu::shared());
  int* channels = reinterpret_cast<int*>(tile + p.octets * kOctet * p.pitch);
  for (int i = gpu::thread(); i < c; i += gpu::num_threads()) channels[i] = source_channel(p.r, first_channel + i);
  const int octet = gpu::thread() / quads, column = gpu::thread() % quads * 4;
  const float* matrix = p.r.blocks + static_cast<int64_t>(first_channel) * c + column;
  const int64_t step = static_cast<int64_t>(p.octets) * kOctet;
  for (int64_t first_row = gpu::block_y() * step; first_row < p.r.rows; first_row += gpu::grid_y() * step) {
    gpu::sync_block();
    gather(p, first_row, channels, tile);
    gpu::sync_block();
    if (octet >= p.octets) continue;
    float y[kOctet][4] = {};
    multiply(p, matrix, tile + octet * p.pitch, y);
    DLLMC_UNROLL
    for (int i = 0; i < kOctet; ++i) {
      const int64_t m = first_row + i * p.octets + octet;
      if (m < p.r.rows) store(p.r, y[i], m * p.r.inner + first_channel + column);
    }
  }
}

// One thread an output, summed in float64.
DLLMC_KERNEL(kNaiveThreads, 1)
void rotate_naive(DLLMC_PARAM RotateArgs p) {
  const int64_t i = static_cast<int64_t>(gpu::block_x()) * gpu::num_threads() + gpu::thread();
  if (i >= p.rows * p.inner) return;
  const int k = static_cast<int>(i % p.inner), c = p.block, first = k - k % c;
  double sum = 0.0;
  for (int j = 0; j < c; ++j) {
    const float x = read(p.x, p.x_type, i - k + source_channel(p, first + j));
    sum += static_cast<double>(x) * p.blocks[static_cast<int64_t>(first + j) * c + k % c];
  }
  if (p.y_type == Type::kFloat32) {
    static_cast<float*>(p.y)[i] = static_cast<float>(sum);
  } else {
    static_cast<gpu::Half*>(p.y)[i] = gpu::to_half(static_cast<float>(sum));
  }
}

int ceil_div(int64_t x, int64_t y) { return static_cast<int>((x + y - 1) / y); }

RotateTile plan_tile(const RotateArgs& r) {
  const int octets = 4 * kThreads / r.block;
  return {r, octets < 1 ? 1 : octets, r.block + 4};
}
size_t tile_bytes(const RotateTile& p) {
  return (static_cast<size_t>(p.octets) * kOctet * p.pitch + p.r.block) * sizeof(float);
}
bool tile_can(const RotateArgs& r, const Device& device) {
  return r.block % 4 == 0 && r.block <= 4 * kThreads &&
         tile_bytes(plan_tile(r)) <= static_cast<size_t>(device.shared_bytes);
}

const char* run_tile(const RotateArgs& r, const Launch& launch) {
  const RotateTile p = plan_tile(r);
  const int blocks = r.inner / r.block, tiles = ceil_div(r.rows, p.octets * kOctet);
  const int walks = ceil_div(4 * launch.device.num_sms, blocks);  // about 4 blocks an SM
  const gpu::Dim grid = {static_cast<unsigned>(blocks), static_cast<unsigned>(tiles < walks ? tiles : walks)};
  return gpu::launch(rotate_tile, grid, kThreads, tile_bytes(p), launch.stream, p);
}

}  // namespace

const char* check(const RotateArgs& p) {
  if (p.rows < 0 || p.rows > INT32_MAX) {
    return reason("rows: got %lld, expected 0 to 2^31 - 1", static_cast<long long>(p.rows));
  }
  if (p.inner <= 0 || p.inner % 8) return reason("inner: got %d, expected a positive multiple of 8", p.inner);
  if (p.block <= 0 || p.inner % p.block) return reason("block: got %d, expected a divisor of %d", p.block, p.inner);
  for (const Type type : {p.x_type, p.y_type}) {
    if (type != Type::kFloat32 && type != Type::kFloat16) {
      return reason("x_type, y_type: got %d, expected 0 (float32) or 1 (float16)", static_cast<int>(type));
    }
  }
  return nullptr;
}

size_t workspace_bytes(const RotateArgs&, const Device&) { return 0; }

const char* run(const RotateArgs& p, const Launch& launch) {
  if (const char* refused = check(p)) return refused;
  if (const char* refused = check_device(launch.device)) return refused;
  if (p.rows == 0) return nullptr;
  if (const char* refused = check_pointers({{"x", p.x}, {"blocks", p.blocks}, {"perm", p.perm}, {"y", p.y}})) {
    return refused;
  }
  const bool can = tile_can(p, launch.device);
  if (launch.path == Path::kTile || (launch.path == Path::kAuto && can)) {
    return can ? run_tile(p, launch)
               : reason("path: got tile, which takes blocks of 4 to 1024 channels, not %d", p.block);
  }
  if (launch.path != Path::kAuto && launch.path != Path::kNaive) {
    return reason("path: got %s, expected auto, naive or tile", path_name(launch.path));
  }
  const gpu::Dim grid = {static_cast<unsigned>(ceil_div(p.rows * p.inner, kNaiveThreads))};
  return gpu::launch(rotate_naive, grid, kNaiveThreads, 0, launch.stream, p);
}

}  // namespace dllmc
