"""tools/cuda_report.py: occupancy, what it reads off SASS, its verdicts, and the whole of it where there is an nvcc."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "cuda_report.py"

pytestmark = pytest.mark.skipif(not TOOL.exists(), reason="the tests run without the source tree")

if TOOL.exists():
    _spec = importlib.util.spec_from_file_location("cuda_report", TOOL)
    report = importlib.util.module_from_spec(_spec)
    sys.modules["cuda_report"] = report  # dataclasses look their module up
    _spec.loader.exec_module(report)


# --- occupancy


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "warps", "limit"),
    [
        (80, 256, 32, 0, 64, "warps"),
        (80, 256, 33, 0, 48, "registers"),  # 1280 registers a warp: 12 of each scheduler's 16384
        (80, 256, 128, 0, 16, "registers"),
        (80, 128, 168, 0, 12, "registers"),
        (80, 288, 96, 0, 18, "registers"),  # 20 warps fit, two blocks of nine
        (80, 32, 16, 0, 32, "blocks"),
        (80, 256, 32, 48 << 10, 24, "shared memory"),
        (90, 256, 32, 48 << 10, 32, "shared memory"),
        (80, 256, 32, 163 << 10, 8, "shared memory"),
        (80, 256, 32, (163 << 10) + 1, 0, "shared memory"),
        (90, 256, 32, 227 << 10, 8, "shared memory"),
        (90, 1024, 65, 0, 0, "registers"),  # 65 of 1024 threads are more than there are
        (90, 1024, 64, 0, 32, "registers"),
        (90, 1, 1, 0, 32, "blocks"),
    ],
)
def test_occupancy(arch, threads, registers, shared, warps, limit):
    assert report.occupancy(report.DEVICES[arch], threads, registers, shared) == report.Occupancy(warps, limit)


# --- what the tools print


def test_every_kernel_is_in_the_table():
    text = "\n".join(path.read_text() for path in sorted((report.ROOT / "csrc" / "cuda").glob("*.cu*")))
    assert set(re.findall(r"(?s)__global__.*?void (\w+)\(", text)) == set(report.KERNELS)


def test_names():
    demangled = "void fastmtl::cuda::gram_tiles<c10::BFloat16, double, (int)16>(fastmtl::cuda::Source, long*)"
    name = report.kernel_name(demangled)
    assert name == "fastmtl::cuda::gram_tiles<c10::BFloat16, double, 16>"
    assert report.short_name(name) == "gram_tiles<BFloat16, double, 16>"
    assert report.split_name(name) == ("gram_tiles", ["c10::BFloat16", "double", "16"])
    assert report.kernel_name("fastmtl::cuda::(anonymous namespace)::eigh(double const*, int)") == "fastmtl::cuda::eigh"
    assert report.split_name("a::f<a::P<int, 2>, 3>") == ("f", ["a::P<int, 2>", "3"])


def test_ptxas():
    found = report.parse_ptxas("""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_90'
ptxas info    : Function properties for _Z1av
    288 bytes stack frame, 560 bytes spill stores, 604 bytes spill loads
ptxas info    : Function properties for _Z6calledv
    8 bytes stack frame, 4 bytes spill stores, 6 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 288 bytes cumulative stack size, 128 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90'
ptxas info    : Function properties for _Z1bv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers
""")
    assert found == {"_Z1av": report.Resources(32, 564, 610, 296, 128), "_Z1bv": report.Resources(255)}


@pytest.mark.parametrize(
    ("text", "kind", "bits", "generic", "at"),
    [
        ("LDG.E.128.CONSTANT R4, desc[UR8][R2.64]", "load", 128, False, ["R2", "R3"]),
        ("@!P0 LDG.E.U16 R4, [R2.64+0x10]", "load", 16, False, ["R2", "R3"]),
        ("LDG.E R4, [R2.64+UR4]", "load", 32, False, ["R2", "R3", "UR4"]),
        ("LD.E.64 R4, desc[UR8][R2.64]", "load", 64, True, ["R2", "R3"]),
        ("LDGSTS.E.BYPASS.128 [R23+0x80], [R6.64]", "load", 128, False, ["R6", "R7"]),
        ("STG.E.64 desc[UR6][R6.64+0x8], R4", "store", 64, False, ["R6", "R7"]),
        ("ST.E.U8 desc[UR6][R6.64], R4", "store", 8, True, ["R6", "R7"]),
    ],
)
def test_accesses(text, kind, bits, generic, at):
    assert report.parse_instruction(0, text).access == report.Access(kind, bits, generic, at)


@pytest.mark.parametrize(
    "text", ["LDGDEPBAR", "LDS.128 R4, [R2]", "STS.64 [R2], R4", "LDL R4, [R1]", "LDC.64 R2, c[0x0][R4]"]
)
def test_no_accesses(text):
    assert report.parse_instruction(0, text).access is None


@pytest.mark.parametrize(
    ("text", "writes", "reads"),
    [
        ("IADD3 R6, P0, P1, R20.reuse, c[0x0][0x160], R3", ["R6", "P0", "P1"], ["R20", "R3"]),
        ("IADD3.X R7, R21, c[0x0][0x164], RZ, P0, !PT", ["R7"], ["R21", "P0"]),
        ("IMAD.WIDE.U32 R2, R5, R0, c[0x2][0x0]", ["R2", "R3"], ["R5", "R0"]),
        ("ISETP.GE.AND.EX P0, PT, R3, R119, PT, P0", ["P0"], ["R3", "R119", "P0"]),
        ("LOP3.LUT P0, R5, R3, 0xff, RZ, 0xc0, !PT", ["P0", "R5"], ["R3"]),
        ("FCHK P0, R2, R3", ["P0"], ["R2", "R3"]),
        ("SHFL.BFLY PT, R10, R4, 0x2, 0x1f", ["R10"], ["R4"]),
        ("LDG.E.128 R4, [R2.64]", ["R4", "R5", "R6", "R7"], ["R2", "R3"]),
        ("STG.E.64 desc[UR6][R6.64], R4", [], ["UR6", "R6", "R7", "R4"]),
        ("DFMA R8, R34.reuse, R8, R26", ["R8", "R9"], ["R34", "R8", "R26"]),
        ("F2F.F64.F32 R62, R53", ["R62", "R63"], ["R53"]),
        ("F2F.F32.F64 R62, R52", ["R62"], ["R52"]),
        ("CS2R R8, SRZ", ["R8", "R9"], []),
    ],
)
def test_registers(text, writes, reads):
    found = report.parse_instruction(0, text)
    assert (found.writes, found.reads) == (writes, reads)


@pytest.mark.parametrize(
    ("text", "targets", "falls_through"),
    [
        ("BRA `(.L_x_0)", [".L_x_0"], False),
        ("@P0 BRA `(.L_x_0)", [".L_x_0"], True),
        ("BRA P1, `(.L_x_0)", [".L_x_0"], True),
        ("BRA.DIV UR4, `(.L_x_0)", [".L_x_0"], True),
        ('BRX R2 -0x10 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)', [".L_x_1", ".L_x_2"], False),
        ("@!P0 CALL.REL.NOINC `(.L_x_0)", [".L_x_0"], True),
        ("CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_u64)", [], True),
        ("RET.REL.NODEC R2 `(kernel)", [], False),
        ("EXIT", [], False),
        ("@P0 EXIT", [], True),
        ("BSSY B0, `(.L_x_0)", [], True),
    ],
)
def test_branches(text, targets, falls_through):
    found = report.parse_instruction(0, text)
    assert (found.targets, found.falls_through) == (targets, falls_through)


def code(body, threads=256):
    """Code as nvdisasm prints it, from instructions and labels on lines of their own."""
    lines, at = [], 0
    for line in body.strip().splitlines():
        text = line.strip()
        if text.endswith(":"):
            lines.append(text)
        else:
            lines.append(f"        /*{at:04x}*/                   {text} ;")
            at += 16
    text = "\n".join(
        [
            '	.section	.nv.info.kernel,"",@"SHT_CUDA_INFO"',
            "	//----- nvinfo : EIATTR_PARAM_CBANK",
            "        /*0018*/ 	.word	index@(.nv.constant0.kernel)",
            "        /*001c*/ 	.word	0x00000007",
            "	//----- nvinfo : EIATTR_MAX_THREADS",
            "        /*0050*/ 	.byte	0x04, 0x05",
            f"        /*0054*/ 	.word	{threads:#010x}",
            "        /*0058*/ 	.word	0x00000001",
            "        /*005c*/ 	.word	0x00000001",
            "	//----- nvinfo : EIATTR_CRS_STACK_SIZE",
            "        /*0064*/ 	.word	0x00000009",
            '	.section	.text.kernel,"ax",@progbits',
            ".text.kernel:",
            *lines,
        ]
    )
    return report.parse_sass(text)["kernel"]


def judged(body, *, expected=None, **resources):
    table = {"kernel": expected or report.Expected(loads=True)}
    resources = report.Resources(**{"registers": 32, **resources})
    return report.judge(report.Compiled("kernel<float>", 80, "x.cu", resources, code(body)), table, {"0": 0})


def loads(verdict):
    return {f"{loop.address:#x}": str(loop.loads) for loop in verdict.loops if loop.loads.counts or loop.loads.beside}


def test_threads_are_those_of_the_launch_bounds():
    assert code("EXIT", threads=288).threads == 288


# --- loops

STREAM = """
    S2R R0, SR_TID.X
    IMAD.WIDE R2, R0, 0x10, R8
    .L_x_0:
    LDG.E.128 R4, [R2.64]
    LDG.E.128 R8, [R2.64+0x1000]
    FFMA R20, R4, R8, R20
    IADD3 R2, P1, R2, 0x10, RZ
    IADD3.X R3, R3, RZ, RZ, P1, !PT
    @P0 BRA `(.L_x_0)
    .L_x_1:
    LDG.E R4, [R2.64]
    FADD R20, R20, R4
    @P0 BRA `(.L_x_1)
    EXIT
    .L_x_2:
    BRA `(.L_x_2)
"""


def test_the_hot_loop_is_the_one_that_loads_most():
    verdict = judged(STREAM)
    assert loads(verdict) == {"0x20": "2x128", "0x80": "1x32"}
    assert (verdict.hot_loads.address, verdict.hot_loads.in_flight) == (0x20, 2)
    assert (verdict.threads, verdict.occupancy.warps, verdict.failures) == (256, 64, [])


def test_narrow_loads_fail():
    verdict = judged(STREAM.replace(".128", ".64"))
    assert verdict.failures == ["narrow loads in the hot loop at 0x0020: 2x64"]
    assert judged(STREAM.replace(".128", ".64"), expected=report.Expected()).failures == []


def test_one_narrow_load_among_wide_ones_fails():
    verdict = judged(STREAM.replace("LDG.E.128 R8", "LDG.E.64 R8"))
    assert verdict.failures == ["narrow loads in the hot loop at 0x0020: 1x128+1x64"]


def test_a_wide_loop_comes_before_a_narrow_one_of_equal_bytes():
    tail = "\n".join(f"LDG.E R{i}, [R2.64+{i}]" for i in range(30, 38))
    verdict = judged(STREAM.replace("LDG.E R4, [R2.64]", tail))
    assert (verdict.hot_loads.address, verdict.failures) == (0x20, [])


def test_spills_fail_anywhere_and_local_memory_in_streams():
    assert judged(STREAM, expected=report.Expected(), spill_loads=4).failures == ["spills: 0 bytes stored, 4 loaded"]
    local = STREAM.replace("FFMA", "STL [R1], R4\nLDL R5, [R1]\nFFMA")
    assert judged(local).failures == ["2 accesses to local memory in a streaming kernel"]
    assert judged(local, expected=report.Expected()).failures == []


def test_narrow_paths_beside_the_wide_one_do_not_fail():
    body = """
        S2R R0, SR_TID.X
        IMAD.WIDE R2, R0, 0x10, R8
        .L_x_0:
        @P1 BRA `(.L_x_1)
        LDG.E.128 R4, [R2.64]
        BRA `(.L_x_2)
        .L_x_1:
        LDG.E R4, [R2.64]
        @P3 LDG.E R5, [R2.64+0x4]
        @P4 LDG.E R6, [R2.64+0x8]
        .L_x_2:
        FADD R20, R20, R4
        @P0 BRA `(.L_x_0)
        EXIT
    """
    verdict = judged(body)
    assert (loads(verdict), verdict.failures) == ({"0x20": "1x128 (3x32)"}, [])
    heavier = judged(body.replace("LDG.E R4,", "LDG.E.64 R4,").replace("LDG.E R5,", "LDG.E.64 R5,"))
    assert heavier.failures == ["narrow loads in the hot loop at 0x0020: 1x128+2x64+1x32"]


NESTED = """
    S2R R0, SR_TID.X
    IMAD.WIDE R2, R0, 0x10, R8
    .L_x_0:
    LDG.E.128 R4, [R2.64]
    .L_x_1:
    LDS.128 R8, [R30]
    FFMA R20, R4, R8, R20
    @P2 BRA `(.L_x_1)
    .L_x_2:
    LDG.E R5, [R2.64+0x4]
    FADD R20, R20, R5
    @P3 BRA `(.L_x_2)
    STG.E desc[UR6][R2.64], R20
    @P0 CALL.REL.NOINC `(.L_x_3)
    BRA `(.L_x_0)
    .L_x_3:
    EXIT
"""


def test_loads_of_an_outer_loop_are_its_own():
    verdict = judged(NESTED)
    assert [(hex(x.address), x.depth, x.innermost) for x in sorted(verdict.loops, key=lambda x: x.address)] == [
        ("0x0", 0, False),
        ("0x20", 1, False),
        ("0x30", 2, True),
        ("0x60", 2, True),
    ]
    assert (loads(verdict), verdict.failures) == ({"0x20": "1x128", "0x60": "1x32"}, [])


def test_stores_are_judged_where_they_must_be_wide():
    expected = report.Expected(loads=True, stores=True)
    assert judged(NESTED, expected=expected).failures == ["narrow stores in the hot loop at 0x0020: 1x32"]
    assert judged(NESTED.replace("STG.E desc", "STG.E.128 desc"), expected=expected).failures == []
    assert judged(STREAM, expected=expected).failures == ["no global stores in a streaming kernel"]


def test_addresses_and_weights_are_not_the_stream():
    body = """
        S2R R0, SR_TID.X
        S2R R1, SR_CTAID.X
        IMAD.WIDE R12, R1, 0x8, R8
        .L_x_0:
        LDG.E.64 R2, [R12.64]
        LDG.E.64 R14, [R12.64+0x100]
        @P1 IADD3 R2, P2, R2, R0, RZ
        @P1 IADD3.X R3, R3, RZ, RZ, P2, !PT
        @P1 LDG.E.128 R4, [R2.64]
        DFMA R20, R14, R4, R20
        @P0 BRA `(.L_x_0)
        EXIT
    """
    verdict = judged(body)
    assert (loads(verdict), verdict.failures) == ({"0x30": "1x128 [1x64 address, 1x64 uniform]"}, [])
    per_thread = judged(body.replace("IMAD.WIDE R12, R1", "IMAD.WIDE R12, R0"))
    assert loads(per_thread) == {"0x30": "1x128+1x64 [1x64 address]"}
    assert per_thread.failures == ["narrow loads in the hot loop at 0x0030: 1x128+1x64 [1x64 address]"]


def test_a_register_that_is_used_again_is_another_value():
    body = """
        S2R R0, SR_TID.X
        IMAD.WIDE R12, R0, 0x8, R8
        .L_x_0:
        @P1 LDG.E.64 R2, [R12.64]
        DADD R20, R20, R2
        @!P2 IADD3 R2, P3, R8, R0, RZ
        @!P2 IADD3.X R3, R9, RZ, RZ, P3, !PT
        @!P2 LDG.E.128 R4, [R2.64]
        DADD R20, R20, R4
        @P0 BRA `(.L_x_0)
        EXIT
    """
    assert loads(judged(body)) == {"0x20": "1x128+1x64"}


def test_what_a_call_returns_depends_on_what_it_is_given():
    body = """
        S2R R0, SR_TID.X
        S2R R1, SR_CTAID.X
        MOV R30, ARGUMENT
        CALL.REL.NOINC `($__internal_0_$divide)
        .L_x_0:
        LDG.E R4, [R32.64]
        @P0 BRA `(.L_x_0)
        EXIT
        $__internal_0_$divide:
        IMAD R33, R30, 0x7, RZ
        IMAD R32, R33, R33, RZ
        RET.REL.NODEC R10 `(kernel)
    """
    assert loads(judged(body.replace("ARGUMENT", "R0"))) == {"0x40": "1x32"}
    assert loads(judged(body.replace("ARGUMENT", "R1"))) == {"0x40": "[1x32 uniform]"}


def test_code_outside_loops_counts_where_there_is_no_loop():
    body = "S2R R0, SR_TID.X\nIMAD.WIDE R2, R0, 0x10, R8\nLDG.E{} R4, [R2.64]\nEXIT"
    assert judged(body.format(".128")).failures == []
    assert judged(body.format("")).failures == ["narrow loads in the hot loop at 0x0000: 1x32"]


def test_what_cannot_be_judged_fails():
    resources = report.Resources(32)
    unknown = report.judge(report.Compiled("a::other<float>", 80, "x.cu", resources, code(STREAM)), {}, {"0": 0})
    assert ["not in the table" in x for x in unknown.failures] == [True]
    unbound = code(STREAM)
    unbound.threads = None
    verdict = report.judge(
        report.Compiled("kernel", 80, "", resources, unbound), {"kernel": report.Expected()}, {"0": 0}
    )
    assert verdict.failures == ["no __launch_bounds__: its block size is not known"]
    table = {"kernel": report.Expected(shared="bytes<{0}>")}
    verdict = report.judge(report.Compiled("kernel<float>", 80, "", resources, code(STREAM)), table, {})
    assert verdict.failures == ["KERNELS: its dynamic shared memory is not a constant expression: bytes<float>"]
    verdict = report.judge(
        report.Compiled("kernel<float>", 80, "", resources, code(STREAM)), table, {"bytes<float>": 1 << 20}
    )
    assert verdict.failures == ["a block does not fit a multiprocessor: shared memory"]


def test_components_are_in_order():
    edges = {0: [1], 1: [2, 3], 2: [1], 3: [4], 4: [3, 5], 5: []}
    assert [sorted(x) for x in report.components(edges, edges)] == [[5], [3, 4], [1, 2], [0]]


# --- with nvcc

SOURCE = """
namespace space {
template <class scalar, int kRows> struct Rows { const scalar* at[kRows]; };

template <class scalar, int kRows>
__global__ void __launch_bounds__(256) good(Rows<scalar, kRows> rows, long n, float* out) {
  float sum[kRows] = {};
  long i = (blockIdx.x * 256l + threadIdx.x) * 4;
  for (; i + 4 <= n; i += gridDim.x * 1024l)
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float4 x = *reinterpret_cast<const float4*>(rows.at[r] + i);
      sum[r] += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
    }
  for (; i < n; ++i)
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r] += rows.at[r][i];
  for (int r = 0; r < kRows; ++r) atomicAdd(out + r, sum[r]);
}

template <class scalar, int kRows>
__global__ void __launch_bounds__(128) narrow(Rows<scalar, kRows> rows, long n, float* out) {
  float sum[kRows] = {};
  for (long i = blockIdx.x * 128l + threadIdx.x; i < n; i += gridDim.x * 128l)
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r] += rows.at[r][i];
  for (int r = 0; r < kRows; ++r) atomicAdd(out + r, sum[r]);
}

__global__ void __launch_bounds__(1024, 2) spills(const float* x, float* out, int n) {
  float a[64];
#pragma unroll
  for (int j = 0; j < 64; ++j) a[j] = x[threadIdx.x + j * 1024];
  for (int k = 0; k < n; ++k)
#pragma unroll
    for (int j = 0; j < 64; ++j) a[j] = a[j] * a[(j + 7) % 64] + a[(j * 5 + 1) % 64];
  float sum = 0;
#pragma unroll
  for (int j = 0; j < 64; ++j) sum += a[j] * j;
  out[threadIdx.x] = sum;
}

// Row addresses from a table and a weight a row in the loop.
__global__ void __launch_bounds__(256) table(const float* const* rows, const double* weights, int T, float4* out) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  float4 sum = {};
  for (int t = 0; t < T; ++t) {
    const float* row = rows[t];
    const float w = float(weights[t]);
    const float4 x = *reinterpret_cast<const float4*>(row + i * 4);
    sum.x += w * x.x; sum.y += w * x.y; sum.z += w * x.z; sum.w += w * x.w;
  }
  out[i] = sum;
}

__global__ void __launch_bounds__(256) staged(const float* x, long n, float* out) {
  extern __shared__ float stage[];
  __shared__ float sums[32];
  float sum = 0;
  for (long i = blockIdx.x * 1024l; i + 1024 <= n; i += gridDim.x * 1024l) {
    const unsigned to = __cvta_generic_to_shared(stage + threadIdx.x * 4);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(x + i + threadIdx.x * 4));
    asm volatile("cp.async.commit_group; cp.async.wait_group 0;");
    __syncthreads();
    for (int k = 0; k < 64; ++k) sum += stage[(k * 33 + threadIdx.x) % 1024];
    __syncthreads();
  }
  sums[threadIdx.x % 32] = sum;
  __syncthreads();
  out[threadIdx.x] = sums[(threadIdx.x * 3) % 32];
}

template __global__ void good<float, 4>(Rows<float, 4>, long, float*);
template __global__ void narrow<float, 4>(Rows<float, 4>, long, float*);
}
"""


@pytest.fixture(scope="module")
def tools():
    try:
        return report.find_tools()
    except report.MissingTool as error:
        pytest.skip(f"no CUDA compiler: {error}")


@pytest.fixture(scope="module")
def table():
    stream = report.Expected(loads=True)
    return {
        "good": stream,
        "narrow": stream,
        "spills": report.Expected(),
        "table": report.Expected(loads=True, stores=True),
        "staged": report.Expected(loads=True, shared="kStage"),
    }


@pytest.fixture(scope="module")
def verdicts(tools, table, tmp_path_factory):
    source = tmp_path_factory.mktemp("cuda") / "kernels_test.cu"
    source.write_text(SOURCE)
    kernels = [x for arch in (80, 90) for x in report.compile_kernels(tools, source, arch)]
    return {(x.arch, x.kernel): x for x in (report.judge(x, table, {"0": 0, "kStage": 4096}) for x in kernels)}


@pytest.mark.parametrize("arch", [80, 90])
def test_compiled_kernels(verdicts, arch):
    good, narrow, spills, table, staged = (
        verdicts[arch, x] for x in ("good<float, 4>", "narrow<float, 4>", "spills", "table", "staged")
    )
    assert good.failures == []
    assert good.hot_loads.loads.counts == {"128": 4}
    assert (good.threads, good.resources.spill_loads, good.local_accesses) == (256, 0, 0)
    assert narrow.threads == 128
    assert [x.partition(" in ")[0] for x in narrow.failures] == ["narrow loads"]
    assert spills.resources.spill_stores > 0
    assert spills.resources.stack > 0
    assert spills.local_accesses > 0
    assert [x.partition(":")[0] for x in spills.failures] == ["spills"]
    assert table.failures == []
    assert table.hot_loads.loads.counts.keys() == {"128"}
    assert sum(table.hot_loads.loads.beside.values()) == 2 * table.hot_loads.loads.counts["128"]
    assert staged.failures == []
    assert staged.hot_loads.loads.counts == {"128": 1}
    assert (staged.resources.shared, staged.dynamic_shared) == (128, 4096)


def test_values_of_expressions(tools):
    prologue = "constexpr unsigned long twice(int n) { return 2 * n; }\nint variable;"
    found = report.evaluate(tools, ["twice(4)", "sizeof(double)", "variable", "0"], prologue)
    assert found == {"twice(4)": 8, "sizeof(double)": 8, "0": 0}


def test_the_command(tools, monkeypatch, tmp_path, capsys, table):
    source, written = tmp_path / "kernels_test.cu", tmp_path / "report.json"
    source.write_text(SOURCE)
    monkeypatch.setattr(report, "PROLOGUE", "constexpr int kStage = 4096;")
    monkeypatch.setattr(report, "KERNELS", table)
    assert report.main([str(source), "--arch", "90", "--json", str(written)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"» good<float, 4> +90  ok", out)
    assert re.search(r"  spills +90  FAIL", out)
    assert "\n2 wrong:\n  narrow<float, 4> sm_90: narrow loads in the hot loop at 0x" in out
    assert {x["kernel"]: bool(x["failures"]) for x in json.loads(written.read_text())} == {
        "good<float, 4>": False,
        "narrow<float, 4>": True,
        "spills": True,
        "staged": False,
        "table": False,
    }


def test_the_command_without_fault_and_without_sense(tools, monkeypatch, tmp_path, capsys):
    source = tmp_path / "kernels_test.cu"
    source.write_text("__global__ void __launch_bounds__(32) fine(int* x) { *x = 1; }")
    monkeypatch.setattr(report, "PROLOGUE", "")
    monkeypatch.setattr(report, "KERNELS", {"fine": report.Expected()})
    assert report.main([str(source), "--arch", "80"]) == 0
    assert "1 kernels: no spills" in capsys.readouterr().out
    source.write_text("not C++")
    assert report.main([str(source), "--arch", "80"]) == 2
    assert "error" in capsys.readouterr().err


def test_a_missing_toolkit_says_what_to_install(monkeypatch, capsys):
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert report.main([str(TOOL)]) == 2
    assert "install the CUDA toolkit and set CUDA_HOME" in capsys.readouterr().err


def test_a_missing_disassembler_says_what_to_install(tools, monkeypatch, capsys):
    which = report.shutil.which
    monkeypatch.setattr(
        report.shutil, "which", lambda name, **more: None if name == "nvdisasm" else which(name, **more)
    )
    assert report.main([str(TOOL)]) == 2
    assert "pip install triton" in capsys.readouterr().err
