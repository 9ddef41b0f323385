"""Every setting of the server: one field is one flag and its help.

`cli/` turns the fields into command-line flags (`max_total_tokens` -> `--max-total-tokens`) and
is the only reader of argv and environment. Each part of the house receives its own record here,
never the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot work; the message names the flag, the value and the mend."""


def flag(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    others: tuple[str, ...] = (),
    words: tuple[str, ...] = (),
    alias: str = "",
    verbatim: bool = False,
    positional: bool = False,
    least: float | None = None,
    most: float | None = None,
    mend: str = "",
) -> Any:
    """A config field with what the command line needs: help text, choices and others that are
    taken but not shown, words that may stand in a number's place, a second spelling, the smallest
    and largest number that makes sense, and what to do about a refused value. The values of a
    verbatim list are taken as they are, and the flag may come again. A positional one is given
    without the flag's name, and must be."""
    taken = {"choices": choices, "others": others, "words": words}
    limits = {"least": least, "most": most, "mend": mend}
    names = {"alias": alias, "verbatim": verbatim, "positional": positional}
    return field(default=default, metadata={"help": help} | names | taken | limits)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What is loaded and in which precision."""

    model: Path | None = flag(
        None, "checkpoint directory; the embedded demo model when absent", alias="--model-path"
    )
    dtype: str = flag(
        "auto",
        "precision of everything but the experts; auto: the checkpoint's, or float32 where the "
        "CPU has no fast bfloat16",
        choices=("auto", "bfloat16", "float32"),
    )
    language_model_only: bool = flag(
        False, "do not load what sees images: requests with images are refused"
    )


@dataclass(frozen=True, slots=True)
class ExpertConfig:
    """Where the routed experts come from and which threads compute them."""

    kt_weight_path: Path | None = flag(
        None, "directory with the expert weights, when not the model's"
    )
    kt_method: str = flag(
        "auto",
        "format of the expert weights; auto: the checkpoint's; int4, int8 or fp8 for bf16 or fp8 "
        "weights quantises them while loading; AMXINT4 and AMXINT8 mean int4 and int8",
        choices=("auto", "bf16", "fp8", "int8", "int4", "AMXINT8", "AMXINT4"),
        mend="weights in RAWINT4, GPTQ_INT4, MXFP4, FP8_PERCHANNEL or GGUF (LLAMAFILE) cannot be "
        "read; take the model's bf16 or fp8 checkpoint, with int4 where memory is short",
    )
    kt_group_size: int | None = flag(
        None,
        "weights that share a scale where they are quantised; default: 64 in int4, 128 in int8",
        choices=("32", "64", "128"),
    )
    kt_activation: str = flag(
        "auto",
        "what the expert products multiply; auto: float32 where the model runs in float32, int8 "
        "for int4 weights (and int8 ones where the CPU does not multiply bfloat16), else bfloat16",
        choices=("auto", "float32", "bfloat16", "int8"),
    )
    kt_cache_dir: Path = flag(
        Path("~/.cache/kttrio"), "where experts that were quantised while loading are kept"
    )
    kt_cpuinfer: int | None = flag(
        None,
        "worker threads for the experts, over all pools; default, and instead of more than there "
        "are processors: the cores we may use",
        least=1,
    )
    kt_threadpool_count: int | None = flag(
        None, "thread pools; default, and at most: one for each NUMA node we may use", least=1
    )
    kt_numa_nodes: tuple[int, ...] = flag(
        (), "NUMA node of each pool; those without processors are left out"
    )
    kt_isa: str = flag(
        "auto",
        "instruction set of the expert kernels; auto: the best this machine grants",
        choices=("auto", "amx", "avx512", "avx2"),
    )


OTHER_BACKENDS = (
    *("aiter", "ascend", "cutlass_mla", "cudnn", "dual_chunk_flash_attn", "fa3", "fa4"),
    *("flashinfer", "flashmla", "flex_attention", "intel_amx", "intel_xpu", "nsa"),
    *("torch_native", "trtllm_mha", "trtllm_mla", "wave"),
)
"""Attention kernels of SGLang that are not here."""

UPDATE_RULES = ("decayed", "last-chunk")


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """Where everything but the CPU's experts runs, and with which kernels."""

    device: str = flag(
        "auto",
        "auto: the GPU if there is one, else the CPU alone; cpu: the CPU, which then stands in for "
        "a GPU where experts are placed on one",
        choices=("auto", "cuda", "cpu"),
        mend="there are no kernels for another device",
    )
    attention_backend: str | None = flag(
        None,
        "kernels of the attention layers: triton (the default on a GPU) or torch; other names that "
        "SGLang has mean the default",
        choices=("triton", "torch"),
        others=OTHER_BACKENDS,
    )
    disable_cuda_graph: bool = flag(
        False, "launch the kernels of decode steps one by one, not as captured graphs"
    )
    cuda_graph_max_bs: int | None = flag(
        None,
        "most sequences of a decode step that is captured; default: --max-running-requests",
        least=1,
    )
    cuda_graph_bs: tuple[int, ...] = flag(
        (), "numbers of sequences whose decode steps are captured; default: powers of two", least=1
    )


STRATEGIES = ("uniform", "front-loading", "random", "frequency")
"""How experts are chosen for the GPU; frequency alone looks at recorded activations."""

AUTO = "auto"
"""Of experts on the GPU: as many as the memory plan leaves room for."""


@dataclass(frozen=True, slots=True)
class PlacementConfig:
    """Which experts live on the device. Where there is none, all of them run on the CPU."""

    kt_num_gpu_experts: int | str | None = flag(
        None,
        "experts on the GPU, for each layer that has experts; auto, the default on a GPU: as many "
        "as fit beside everything else",
        least=0,
        words=(AUTO,),
    )
    kt_gpu_experts_ratio: float | None = flag(
        None, "share of all experts on the GPU, instead of their number", least=0.0, most=1.0
    )
    kt_expert_placement_strategy: str | None = flag(
        None,
        "which experts go to the GPU: as many of each layer (uniform, the default), the first "
        "layers', any (with seed 42), or those used most by --init-expert-location (frequency, the "
        "default where dynamic update knows from before what is used)",
        choices=STRATEGIES,
    )
    init_expert_location: str | None = flag(
        None, "recorded activations (.pt file) or trivial, the default: none"
    )
    kt_gpu_prefill_token_threshold: int | None = flag(
        None,
        "a prompt with so many tokens to compute passes through the model layer by layer, and each "
        "of its experts once through the GPU; 0: never; default: 2048 on a GPU",
        least=0,
    )
    kt_ring_experts: int | None = flag(
        None,
        "experts on their way through the GPU, for prompts; 0: none ever are; default: 64 on a "
        "GPU, fewer where its memory is short",
        least=0,
    )
    kt_enable_dynamic_expert_update: bool = flag(
        False, "choose the experts on the GPU anew, again and again, by what requests use"
    )
    kt_dynamic_update_rule: str | None = flag(
        None,
        "by which they are chosen: those used most lately, over all layers (decayed, the default), "
        "or in each layer those that the last step with a long prompt used most (last-chunk)",
        choices=UPDATE_RULES,
    )
    kt_expert_state: Path | None = flag(
        None,
        "file that keeps what dynamic update has learnt, for the next start; default: one for "
        "each model in --kt-cache-dir",
    )
    kt_max_deferred_experts_per_token: int | None = flag(
        None,
        "experts on the CPU whose result may reach a token a layer later; more than 0 changes "
        "answers; default: 0",
        least=0,
    )
    record_kt_gpu_expert_distribution: bool = flag(
        False, "record which experts are on the GPU at each step"
    )


@dataclass(frozen=True, slots=True)
class RecordingConfig:
    """What is written down, on command, of the experts that requests use."""

    expert_distribution_recorder_mode: str | None = flag(
        None,
        "how activations are recorded, from POST /start_expert_distribution_record on: counts of "
        "each step in one tensor (stat, and stat_approx, which is exact here) or step by step "
        "(per_pass), or with the token ids of requests, from which anyone can read their texts "
        "(per_token); default: not at all",
        choices=("stat", "stat_approx", "per_pass", "per_token"),
    )
    expert_distribution_recorder_buffer_size: int | None = flag(
        None,
        "steps that are kept, the last ones, in memory; -1: all; default: 1000. A step takes 4 "
        "bytes for each expert of each layer, per_token as many for each choice of a token, too",
        least=-1,
    )
    expert_distribution_recorder_dir: Path | None = flag(
        None,
        "where POST /dump_expert_distribution_record writes; default: what the environment "
        "variable SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR says, else /tmp",
    )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How requests share the machine."""

    chunked_prefill_size: int = flag(
        2048,
        "most tokens of one step, over all requests; fewer where memory is short",
        least=1,
        mend="a step is always bounded",
    )
    max_running_requests: int = flag(
        64, "requests that run at the same time; fewer where memory is short", least=1
    )
    max_total_tokens: int | None = flag(
        None,
        "tokens the KV cache holds, at most what --mem-fraction-static leaves; default: that, on "
        "a CPU at most 8192 for each running request",
        least=1,
    )
    mem_fraction_static: float = flag(
        0.8,
        "share of memory that weights, caches and scratch may fill together; the process itself "
        "takes 0.3 GiB of the rest, and in bfloat16 torch's compiled kernels up to 0.3 GiB",
        least=0.01,
        most=1.0,
    )
    context_length: int | None = flag(
        None,
        "longest sequence in tokens, prompt and output; default: the model's own limit",
        least=1,
    )
    page_size: int = flag(16, "tokens per page of the KV cache", least=1)
    max_image_tokens: int = flag(
        4096,
        "an image that would make more tokens is made smaller; Qwen3.5 has 1024 for a million "
        "pixels",
        least=256,
    )
    max_queued_requests: int = flag(
        256, "requests that may wait; one more is answered 429 with Retry-After", least=0
    )
    random_seed: int | None = flag(
        None, "seed from which requests without a seed of their own draw theirs", least=0
    )
    # One is what the layer was trained to draft. Each draft is one more row through the routed
    # experts, and the further ones, made of drafts, are accepted ever more rarely.
    speculative_algorithm: str | None = flag(
        None,
        "draft tokens with the checkpoint's own prediction layer and verify them in one step; "
        "answers stay what they are; EAGLE and NEXTN mean the same; default: off",
        choices=("MTP", "NEXTN", "EAGLE"),
        mend="the only drafts are those of the checkpoint's own layer (MTP)",
    )
    speculative_num_draft_tokens: int = flag(
        1, "drafts in a step, for each request", least=1, most=8
    )

    @property
    def num_drafts(self) -> int:
        """Most drafts of a sequence in a step; 0 without speculation."""
        return 0 if self.speculative_algorithm is None else self.speculative_num_draft_tokens


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What the HTTP side promises."""

    host: str = flag("127.0.0.1", "address to listen on")
    port: int = flag(30000, "TCP port; 0 picks a free one", least=0, most=65535)
    grpc_port: int | None = flag(
        None,
        "TCP port of inference.GRPCInferenceService, over HTTP/2; 0 picks a free one; default: "
        "none",
        least=0,
        most=65535,
    )
    ssl_certfile: Path | None = flag(
        None, "serve over TLS with this certificate and its chain, a PEM file"
    )
    ssl_keyfile: Path | None = flag(
        None, "the certificate's key, a PEM file; default: in the certificate's file"
    )
    ssl_keyfile_password: str | None = flag(None, "what unlocks the key")
    ssl_ca_certs: Path | None = flag(
        None, "let in only clients that show a certificate signed by one of these, a PEM file"
    )
    served_model_name: str | None = flag(
        None, "name in /v1/models and in answers; default: the checkpoint directory's name"
    )
    api_key: tuple[str, ...] = flag(
        (),
        "key that every request must carry (Authorization: Bearer, or X-Api-Key), but for health "
        "checks and /metrics; several, or the flag again: any of them; KTTRIO_API_KEY may hold one",
        verbatim=True,
    )
    admin_api_key: str | None = flag(
        None,
        "key without which nobody aborts others' requests, records, or reads the settings; "
        "default, where there is one: any --api-key; KTTRIO_ADMIN_API_KEY may hold it",
    )
    allowed_origins: tuple[str, ...] = flag(
        (), "origins whose web pages may use the server (CORS), or *; default: none"
    )
    access_log: bool = flag(True, "a line in the log for each HTTP request, without its content")
    weight_version: str = flag("default", "reported in the metadata of every answer")
    chat_template: Path | None = flag(
        None, "jinja chat template file, instead of the checkpoint's own"
    )
    tool_call_parser: str | None = flag(
        None,
        "how tool calls are read from the model's text (deepseekv3, deepseekv31, deepseekv32, "
        "glm45, hermes, kimi_k2, minimax_m2, qwen3_coder); default, and auto: by checkpoint",
    )
    reasoning_parser: str | None = flag(
        None,
        "how reasoning is told from content (deepseek-r1, deepseek-v3, glm45, kimi, minimax, "
        "qwen3, off); default, and auto: by checkpoint",
    )
    max_body_bytes: int = flag(16 * 1024 * 1024, "largest request body", least=1024)
    max_image_bytes: int = flag(
        16 * 1024 * 1024,
        "most bytes of a request's images together, as PNG, JPEG or WebP",
        least=1,
    )
    max_image_memory: int = flag(
        2 * 1024**3,
        "most bytes that the images of all requests take in memory, Qwen3.5's 3 KiB a token; one "
        "more request with images is answered 429 with Retry-After",
        least=1,
    )
    allow_image_urls: bool = flag(
        False, "fetch images by http: and https: URLs from public addresses, not data: URLs alone"
    )
    image_url_seconds: float = flag(
        10.0, "fetching a request's images may take so many seconds", least=0.1
    )
    drain_seconds: float = flag(
        30.0, "on SIGTERM running requests may go on for so long before they are ended", least=0
    )
    stream_write_timeout: float = flag(
        20.0, "a client that reads nothing for so many seconds is cut", least=0.1
    )
    stream_keepalive_seconds: float = flag(
        15.0, "a silent stream carries a comment every so many seconds", least=0.1
    )
    idle_timeout: float = flag(
        60.0, "a kept-alive connection without request is closed after so many seconds", least=0.1
    )
    header_timeout: float = flag(
        10.0, "the head of a request, once begun, must be complete in so many seconds", least=0.1
    )
    body_timeout: float = flag(
        30.0, "the body of a request must be complete in so many seconds", least=0.1
    )
    max_connections: int = flag(
        2048, "clients connected at once; one more is told 503 and let go", least=1
    )
    log_level: str = flag(
        "info", "how much is logged", choices=("debug", "info", "warning", "error")
    )


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """All that concerns the model and where it runs: what a start and its preview are told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    experts: ExpertConfig = field(default_factory=ExpertConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    recording: RecordingConfig = field(default_factory=RecordingConfig)
