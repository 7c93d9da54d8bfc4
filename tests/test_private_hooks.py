"""What we override or call of other libraries without their promise: a release that changes one of these fails here.

A public hook is better. Where there is none, the table says why; nothing that is not in it may be used.
"""

import ast
import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path

import pytest


FOLDERS = {
    "src/age_vlm": "age_vlm",
    "configuration": "age_vlm.configuration",
    "modeling_agevlm": "age_vlm.modeling_agevlm",
    "processing": "age_vlm.processing",
}
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Hook:
    """
    Attributes:
        name: as our code says it.
        files: of ours that use it.
        reason: why no public one serves.
        where: what has it: `module:qualified.name`.
        signature: of it, if it is called or overridden.
        used_by: upstream code that has to mention it, or the override would do nothing: `module:qualified.name`.
    """

    name: str
    files: tuple[str, ...]
    reason: str
    where: str
    signature: str | None = None
    used_by: str | None = None


TRAINER, RUN = "src/age_vlm/training/trainer.py", "src/age_vlm/training/distributed.py"
BASE, MODEL, TEXT = (
    "modeling_agevlm/pretrained_agevlm.py",
    "modeling_agevlm/modeling_agevlm.py",
    "modeling_agevlm/cross_attention_agevlm.py",
)
VISION, PLANNED = "modeling_agevlm/vision_agevlm.py", "src/age_vlm/commands/planning/plan.py"
PRETRAINED = "transformers.modeling_utils:PreTrainedModel"
DECLARED = "transformers asks every model class to declare it"
HOOKS = [
    Hook(
        "_get_train_sampler", (TRAINER,), "samplers by length look into the data set, which we wrap to name bad samples",
        "transformers:Trainer._get_train_sampler", "(self, train_dataset)", "transformers:Trainer.get_train_dataloader",
    ),
    Hook(
        "_n_gpu", (RUN,), "`TrainingArguments` has no setting against DataParallel",
        "transformers:TrainingArguments._setup_devices", None, "transformers:TrainingArguments.n_gpu",
    ),
    Hook(
        "_reset_state", (RUN,), "accelerate keeps one state a process, and the warm start is of one process alone",
        "accelerate.state:AcceleratorState._reset_state", "(reset_partial_state)",
    ),
    Hook(
        "_fingerprint", ("src/age_vlm/grounding/inputs.py",), "datasets shows no hash of a data set's content otherwise",
        "datasets:Dataset._fingerprint", None, "datasets:Dataset.__init__",
    ),
    Hook("_no_split_modules", (BASE, TEXT, VISION, PLANNED, TRAINER), DECLARED, f"{PRETRAINED}._no_split_modules", None,
         "accelerate:FullyShardedDataParallelPlugin.set_auto_wrap_policy"),
    Hook("_supports_flash_attn", (BASE,), DECLARED, f"{PRETRAINED}._supports_flash_attn"),
    Hook("_supports_sdpa", (BASE,), DECLARED, f"{PRETRAINED}._supports_sdpa"),
    Hook("_supports_flex_attn", (BASE,), DECLARED, f"{PRETRAINED}._supports_flex_attn"),
    Hook("_can_compile_fullgraph", (BASE,), DECLARED, f"{PRETRAINED}._can_compile_fullgraph"),
    Hook("_supports_attention_backend", (BASE,), DECLARED, f"{PRETRAINED}._supports_attention_backend"),
    Hook("_tied_weights_keys", (MODEL,), DECLARED, f"{PRETRAINED}._tied_weights_keys", None,
         f"{PRETRAINED}.get_expanded_tied_weights_keys"),
    Hook("_tp_plan", (MODEL,), DECLARED, f"{PRETRAINED}._tp_plan", None, f"{PRETRAINED}.supports_tp_plan"),
    Hook("_can_record_outputs", (TEXT,), DECLARED, "transformers:LlamaModel._can_record_outputs"),
    Hook("_keys_to_ignore_on_load_missing", (BASE,), "what a checkpoint leaves out on purpose is not reported as missing",
         f"{PRETRAINED}._keys_to_ignore_on_load_missing", None, f"{PRETRAINED}._adjust_missing_and_unexpected_keys"),
    Hook("_init_weights", (BASE, TEXT), "the way of transformers to start new weights", f"{PRETRAINED}._init_weights",
         "(self, module)", f"{PRETRAINED}._initialize_weights"),
    Hook("_from_config", ("modeling_agevlm/backbones_agevlm.py", VISION), "classes of ours that no Auto class knows of",
         f"{PRETRAINED}._from_config", "(config, **kwargs)"),
    Hook("_attn_implementation", (TEXT, "src/age_vlm/commands/check.py"), "every model of transformers reads it there",
         "transformers:PreTrainedConfig._attn_implementation", None, "transformers:LlamaAttention.forward"),
    Hook("_expand_inputs_for_generation", ("modeling_agevlm/generation_agevlm.py",),
         "images have no batch dimension that beams could be expanded along",
         "transformers:GenerationMixin._expand_inputs_for_generation",
         "(self, expand_size, is_encoder_decoder, input_ids, **model_kwargs)", "transformers:GenerationMixin.generate"),
    Hook("_update_model_kwargs_for_generation", ("modeling_agevlm/generation_agevlm.py",),
         "of what a step returns, generation keeps no cross-attention for a model without an encoder",
         "transformers:GenerationMixin._update_model_kwargs_for_generation",
         "(self, outputs, model_kwargs, is_encoder_decoder, num_new_tokens)", "transformers:GenerationMixin._sample"),
    Hook("_layer_type", ("modeling_agevlm/cache_agevlm.py",), "by it a subclass would take the place of transformers' own layer",
         "transformers.cache_utils:CacheLayerMixin._layer_type", None,
         "transformers.cache_utils:CacheLayerMixin.__init_subclass__"),
    Hook("_hf_hook", (VISION,), "accelerate says nowhere else where offloaded weights will run",
         "accelerate.hooks:add_hook_to_module", None, "accelerate.hooks:add_hook_to_module"),
    Hook("_apply", (TEXT,), "gates stay in float32 whatever a model is converted to", "torch.nn:Module._apply",
         "(self, fn, recurse)", "torch.nn:Module.to"),
    Hook("_prep_prompts", ("src/age_vlm/grounding/sam2_package.py",), "the package's `predict` takes one image at a time",
         "sam2.sam2_image_predictor:SAM2ImagePredictor._prep_prompts"),
    Hook("_predict", ("src/age_vlm/grounding/sam2_package.py",), "as above",
         "sam2.sam2_image_predictor:SAM2ImagePredictor._predict"),
    Hook("torch._subclasses.fake_tensor", ("src/age_vlm/commands/planning/fake_step.py",), "tensors without content",
         "torch._subclasses.fake_tensor:FakeTensorMode"),
    Hook("torch.utils._python_dispatch", ("src/age_vlm/commands/planning/fake_step.py", "src/age_vlm/commands/planning/peak_memory.py"),
         "the only way to see each operation", "torch.utils._python_dispatch:TorchDispatchMode"),
    Hook("torch.utils._pytree", ("src/age_vlm/commands/planning/peak_memory.py",), "what an operation returns may be nested",
         "torch.utils._pytree:tree_leaves", "(tree, is_leaf)"),
]  # fmt: skip


def found(place):
    """The object of `module:qualified.name`."""
    module, _, name = place.partition(":")
    if module.startswith("sam2"):
        pytest.importorskip("sam2")
    if name.startswith("LlamaAttention"):
        module = "transformers.models.llama.modeling_llama"
    value = importlib.import_module(module)
    for part in name.split("."):
        value = inspect.getattr_static(value, part) if inspect.isclass(value) else getattr(value, part)
    return getattr(value, "fget", None) or getattr(value, "__func__", value)


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)
def test_upstream_still_has_it_and_uses_it(hook):
    if hook.name == "_fingerprint":  # an attribute of each
        import datasets

        assert isinstance(datasets.Dataset.from_dict({"a": [1]})._fingerprint, str)
    else:
        there = found(hook.where)
        if hook.signature is not None:
            parameters = inspect.signature(there).parameters.values()
            names = [f"{'**' if each.kind == each.VAR_KEYWORD else ''}{each.name}" for each in parameters]
            assert f"({', '.join(names)})".replace("(cls, ", "(") == hook.signature
    if hook.used_by is not None:
        assert hook.name in inspect.getsource(found(hook.used_by))


def private(name):
    # Those of a named tuple are public: the underscore keeps them apart from its fields.
    named_tuple = ("_asdict", "_field_defaults", "_fields", "_make", "_replace")
    return name.startswith("_") and not name.startswith("__") and name not in named_tuple


def our_modules():
    """File -> its syntax tree and the name it is imported by."""
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *(part for part in inside if part != "__init__")])
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text("utf-8")), name


def overridden(tree, module):
    """Private names that a class of the module has and a class of another library had before it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.bases:
            assigned = [target for each in node.body if isinstance(each, ast.Assign) for target in each.targets]
            members = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
            members = {name for name in members | {t.id for t in assigned if isinstance(t, ast.Name)} if private(name)}
            if members:
                try:
                    mro = getattr(importlib.import_module(module), node.name).__mro__[1:]
                except ModuleNotFoundError as error:
                    if error.name != "sam2":  # not in every environment
                        raise
                    continue
                foreign = [base for base in mro if not base.__module__.startswith("age_vlm")]
                yield from (name for name in members if any(name in vars(base) for base in foreign))


def mentioned(tree):
    """Private names behind a dot, in `getattr` and its kin, and in imports of other packages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            if isinstance(node.args[1], ast.Constant) and private(str(node.args[1].value)):
                yield node.args[1].value
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            if any(private(part) for part in node.module.split(".")):
                yield node.module
            yield from (alias.name for alias in node.names if private(alias.name))


def own_names(tree):
    """Private names that are defined here: functions, members, attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr


def test_nothing_private_is_used_that_is_not_in_the_table():
    modules = list(our_modules())
    assert len(modules) > 80
    overrides = {file: set(overridden(tree, module)) for file, tree, module in modules}
    foreign = set().union(*overrides.values())
    own = {name for _, tree, _ in modules for name in own_names(tree)} - foreign
    used = {
        (name, file)
        for file, tree, _ in modules
        for name in overrides[file] | {each for each in mentioned(tree) if each not in own}
    }
    table = {(hook.name, file) for hook in HOOKS for file in hook.files}
    assert sorted(used - table) == [], "not in the table"
    assert sorted(table - used) == [], "in the table, but no longer used"
    assert all(hook.reason for hook in HOOKS)


def test_the_scan_finds_what_is_planted():
    tree = ast.parse(
        "from torch._x import y\nclass A(B):\n    def _own(self): ...\n"
        "a._n_gpu = 1\nsuper()._clip()\ngetattr(m, '_hf_hook', 0)\nself._mine = 1\n"
    )
    assert set(mentioned(tree)) == {"torch._x", "_n_gpu", "_clip", "_hf_hook", "_mine"}
    assert {"_own", "_mine"} <= set(own_names(tree)) and "_n_gpu" not in set(own_names(tree))
    import age_vlm.training.trainer as module

    source = ast.parse(Path(module.__file__).read_text("utf-8"))
    assert set(overridden(source, module.__name__)) == {"_get_train_sampler"}
