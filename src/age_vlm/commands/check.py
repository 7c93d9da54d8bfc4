"""`age-vlm check`: whether a model still answers as it should with the packages that are installed here.

Run after an upgrade. A release of transformers once made models answer wrongly without an error; each check compares with a
reference that such a change would not touch: the same text without a cache, the row alone, plain Llama, eager attention.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, LlamaForCausalLM, StaticCache
from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available, logging

from ..configuration import preset_config
from ..data.scenes_tokenizer import build_scenes_tokenizer
from ..hub import load_checkpoint, save_checkpoint
from ..modeling_agevlm import AgeVlmForConditionalGeneration
from ..processing import AgeVlmProcessor, whole_image_processor
from .ask import bundled_checkpoint


NEW_TOKENS = 6
# Largest difference of logits, as a share of the largest logit: float32 sums in another order, halves round each layer.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}

# Runs where age-vlm cannot be imported: a checkpoint has to bring its code.
LOAD_BY_ITS_OWN_CODE = """
import sys
sys.modules["age_vlm"] = None
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, given, answer = sys.argv[1:]
AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
save_file({"logits": model(**load_file(given)).logits.detach().float().contiguous()}, answer)
"""


@dataclass(frozen=True)
class Result:
    """
    Attributes:
        passed: `None` where it cannot be tried here.
        detail: a few words: the difference, or why not.
    """

    name: str
    passed: bool | None
    detail: str


def package_versions() -> list[tuple[str, str, str, bool]]:
    """Name, installed version, tested range, whether it is inside, of each package that age-vlm requires."""
    found = []
    for requirement in map(Requirement, importlib.metadata.requires("age-vlm") or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            installed = importlib.metadata.version(requirement.name)
            inside = requirement.specifier.contains(installed, prereleases=True)
            found.append((requirement.name, installed, str(requirement.specifier), inside))
    return found


def load_for_check(name: str | Path | None) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor, str]:
    """Model in float32, processor, and what they are; the repository's example checkpoint for `None`, or, where that is not
    here, a small model with random weights. Closed gates are opened: behind them nothing could be seen to be wrong."""
    if name is not None or bundled_checkpoint().is_dir():
        name = name or bundled_checkpoint()
        model, processor = load_checkpoint(name)
        shown = str(name)
    else:
        tokenizer = build_scenes_tokenizer()
        processor = AgeVlmProcessor(whole_image_processor(64), tokenizer)
        config = preset_config("age-vlm-tiny", image_token_id=processor.image_token_id)
        config.text_config.vocab_size = len(tokenizer)
        torch.manual_seed(0)
        model, shown = AgeVlmForConditionalGeneration(config), "a small model with random weights"
    model = model.float().eval()
    gates = [weight for name, weight in model.named_parameters() if name.split(".")[-2] in ("attn_gate", "mlp_gate")]
    if not any(gate.any() for gate in gates):
        with torch.no_grad():
            for gate in gates:
                gate.fill_(0.5)
        shown += ", its closed gates opened"
    return model, processor, shown


class Checks:
    """The checks of one model; each is a method that yields results."""

    def __init__(self, model: AgeVlmForConditionalGeneration, processor: AgeVlmProcessor):
        self.model, self.processor = model, processor
        noise = np.random.default_rng(0)
        images = [PIL.Image.fromarray(noise.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for _ in range(3)]
        # Rows of other lengths and numbers of images: what belongs to another row must show.
        questions = (("what is in it?", images[:2]), ("is there a red circle?", []), ("how many?", images[2:]))
        self.rows = [self._row(*question) for question in questions]
        self.batch = self._padded(self.rows)
        self.reference = self._logits(model, self.batch)

    def all(self) -> Iterator[Result]:
        for name, check in (
            ("with a cache as without", self.cached),
            ("in a batch as alone", self.alone),
            ("text alone as plain Llama", self.text_alone),
            ("other ways to decode", self.decoding),
            ("attention", self.backends),
            ("dtype", self.dtypes),
            ("saved and loaded", self.saved),
        ):
            yield from _tried(name, check)

    def cached(self) -> Iterator[Result]:
        steps = self.model.generate(**self.batch, **self._greedy(), use_cache=False)
        steps = steps[:, self.batch["input_ids"].shape[1] :]
        grown = self._extended(steps[:, :-1])
        expected = self._logits(self.model, grown)[:, -NEW_TOKENS:]
        text = self.model.config.text_config
        longest = grown["input_ids"].shape[1] + 1
        for kind, cache in (
            ("dynamic", DynamicCache(config=text)),
            ("static", StaticCache(config=text, max_cache_len=longest)),
        ):
            yield self._compared(f"with a {kind} cache as without", self._stepwise(cache, steps), expected)

    def alone(self) -> Iterator[Result]:
        got = torch.stack([self._logits(self.model, row)[0, -1] for row in self.rows])
        yield self._compared("in a batch as alone", got, self.reference[:, -1])

    def text_alone(self) -> Iterator[Result]:
        llama = LlamaForCausalLM(copy.deepcopy(self.model.config.text_config)).eval()
        weights = {f"model.{name}": value for name, value in self.model.model.language_model.state_dict().items()}
        weights["lm_head.weight"] = self.model.lm_head.weight
        left = llama.load_state_dict(weights, strict=False)
        if left.missing_keys or any(".cross_attention." not in name for name in left.unexpected_keys):
            yield Result("text alone as plain Llama", False, f"weights do not fit: {left.missing_keys[:1]}")
            return
        text = {name: value for name, value in self.rows[1].items() if name != "pixel_values"}
        same = torch.equal(self._logits(self.model, text), self._logits(llama, text))
        yield Result("text alone as plain Llama", same, "bit for bit" if same else "logits differ")

    def decoding(self) -> Iterator[Result]:
        row = self.rows[0]
        expected = self.model.generate(**row, **self._greedy(), use_cache=False)
        for name, settings in (
            ("prompt lookup", {"prompt_lookup_num_tokens": 3}),
            ("static cache", {"cache_implementation": "static", "disable_compile": True}),
            ("one beam of two", {"num_beams": 2, "num_return_sequences": 2}),
        ):
            got = self.model.generate(**row, **{**self._greedy(), **settings})
            if "num_beams" in settings:
                again = self.model.generate(**row, **{**self._greedy(), **settings}, use_cache=False)
                same = torch.equal(got, again)
            else:
                same = torch.equal(got, expected)
            yield Result(f"{name}, as without a cache", same, "same tokens" if same else "other tokens")

    def backends(self) -> Iterator[Result]:
        names = ["sdpa"]
        if is_torch_flex_attn_available():
            names.append("flex_attention")
        if is_flash_attn_2_available():
            names.append("flash_attention_2")
        before = self.model.config.text_config._attn_implementation
        self.model.set_attn_implementation({"text_config": "eager"})
        expected = self._logits(self.model, self.batch)
        try:
            for name in names:
                yield from _tried(f"{name} as eager", lambda name=name: self._backend(name, expected))
        finally:
            self.model.set_attn_implementation({"text_config": before})

    def _backend(self, name: str, expected: torch.Tensor) -> Iterator[Result]:
        self.model.set_attn_implementation({"text_config": name})
        yield self._compared(f"{name} as eager", self._logits(self.model, self.batch), expected)

    def dtypes(self) -> Iterator[Result]:
        for dtype in (torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            yield from _tried(f"{name} as float32", lambda dtype=dtype, name=name: self._dtype(dtype, name))

    def _dtype(self, dtype: torch.dtype, name: str) -> Iterator[Result]:
        halved = copy.deepcopy(self.model).to(dtype)
        yield self._compared(f"{name} as float32", self._logits(halved, self.batch), self.reference, dtype)

    def saved(self) -> Iterator[Result]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = save_checkpoint(self.model, self.processor, Path(scratch) / "checkpoint")
            loaded = AgeVlmForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
            yield self._compared("saved and loaded", self._logits(loaded, self.batch), self.reference)
            del loaded
            given, answer = Path(scratch) / "given.safetensors", Path(scratch) / "answer.safetensors"
            save_file({name: value.contiguous() for name, value in self.batch.items()}, given)
            environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch) / "modules"), "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-c", LOAD_BY_ITS_OWN_CODE, folder, given, answer]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            name = "by the code it carries, in a new process"
            if done.returncode:
                yield Result(name, False, done.stderr.strip().splitlines()[-1])
            else:
                yield self._compared(name, load_file(answer)["logits"][:, -1], self.reference[:, -1])

    # What the checks are made of

    def _row(self, question: str, images: list) -> dict[str, torch.Tensor]:
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        row = self.processor(images=images or None, text=text, return_tensors="pt", add_special_tokens=False)
        return {name: row[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in row}

    def _padded(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        longest = max(row["input_ids"].shape[1] for row in rows)
        pad = self.processor.tokenizer.pad_token_id or 0

        def left(name: str, value: int) -> torch.Tensor:
            wide = [torch.nn.functional.pad(row[name], (longest - row[name].shape[1], 0), value=value) for row in rows]
            return torch.cat(wide)

        pixels = torch.cat([row["pixel_values"] for row in rows if "pixel_values" in row])
        return {
            "input_ids": left("input_ids", pad),
            "attention_mask": left("attention_mask", 0),
            "pixel_values": pixels,
        }

    def _extended(self, steps: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = torch.cat([self.batch["attention_mask"], torch.ones_like(steps)], dim=1)
        ids = torch.cat([self.batch["input_ids"], steps], dim=1)
        return {**self.batch, "input_ids": ids, "attention_mask": mask}

    @torch.no_grad()
    def _stepwise(self, cache, steps: torch.Tensor) -> torch.Tensor:
        inputs, mask, logits = dict(self.batch), self.batch["attention_mask"], []
        for step in range(steps.shape[1]):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs["input_ids"].shape[1] :]
            inputs |= {"attention_mask": mask, "position_ids": positions}
            logits.append(self.model(**inputs, cache=cache, use_cache=True).logits[:, -1])
            inputs = {"input_ids": steps[:, step : step + 1]}
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return torch.stack(logits, dim=1)

    @torch.no_grad()
    def _logits(self, model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of the positions that are no padding: what stands in padding is nobody's."""
        logits = model(**batch, use_cache=False).logits.float()
        return logits * batch["attention_mask"][..., None]

    def _greedy(self) -> dict:
        return {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}

    def _compared(
        self, name: str, got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> Result:
        difference = ((got - expected).abs().max() / expected.abs().max()).item()
        return Result(
            name, difference <= TOLERANCE[dtype], f"differs by {difference:.1e}, {TOLERANCE[dtype]:g} allowed"
        )


def _tried(name: str, check: Callable[[], Iterator[Result]]) -> Iterator[Result]:
    try:
        yield from check()
    except Exception as error:
        # The report has to come to its end, whatever a release broke.
        yield Result(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def check(model_name: str | Path | None = None) -> bool:
    """Prints both tables; whether every package is inside its range and every check passed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    marks = {True: Text("ok", "green"), False: Text("FAILED", "bold red"), None: Text("-")}
    versions = Table("package", "installed", "tested range", "")
    packages = package_versions()
    for name, installed, wanted, inside in packages:
        versions.add_row(name, installed, wanted, marks[inside] if inside else Text("outside", "bold yellow"))
    console.print(versions)

    model, processor, shown = load_for_check(model_name)
    table = Table("check", "", "", title=Text(shown))
    results = []
    with console.status("checking"):
        for result in Checks(model, processor).all():
            results.append(result)
            table.add_row(Text(result.name), marks[result.passed], Text(result.detail))
    console.print(table)
    failed = sum(result.passed is False for result in results)
    outside = [name for name, *_, inside in packages if not inside]
    said = f"{failed} of {len(results)} checks failed." if failed else f"All {len(results)} checks passed."
    if outside:
        said += f" Outside of the tested range: {', '.join(outside)}."
    console.print(said)
    return not failed
