"""The models under transformers' own tests: `nox -s transformers_suites -- CHECKOUT VERSION` copies this folder into a checkout of
transformers, as `tests/models/age_vlm`, and runs it there.

Skipped is what transformers' test of FastVLM, a model with an encoder of timm, skips, and nothing else.
"""

import json
import os
import tempfile
import unittest
from pathlib import Path

from transformers import CLIPVisionConfig, LlamaConfig, TimmWrapperConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.testing_utils import torch_device

from age_vlm import AgeVlmConfig, AgeVlmForConditionalGeneration, AgeVlmModel, AgeVlmProcessor
from age_vlm.processing import whole_image_processor

from .test_processing_age_vlm import IMAGE_TOKEN, SPECIAL_TOKENS, make_tokenizer


# As a model inside transformers has its names in these lists.
modeling_auto.MODEL_MAPPING_NAMES["age_vlm"] = "AgeVlmModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["age_vlm"] = "AgeVlmForConditionalGeneration"
PROCESSOR_MAPPING_NAMES["age_vlm"] = "AgeVlmProcessor"

TEXT = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 512,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
TIMM = {
    "architecture": "convnext_atto",
    "do_pooling": False,
    "hidden_size": 16,
    "model_args": {
        "features_only": True,
        "out_indices": [1],
        "depths": [1, 1, 1, 1],
        "dims": [8, 16, 16, 16],
        "ls_init_value": None,
    },
}


def write_tiny_models(folder: Path) -> None:
    """What the tests of pipelines would download."""
    processor = AgeVlmProcessor(
        whole_image_processor(32), make_tokenizer(extra_special_tokens={"image_token": IMAGE_TOKEN})
    )
    config = AgeVlmConfig(
        text_config={**TEXT, "vocab_size": 300, "pad_token_id": 6, "eos_token_id": 5},
        vision_config={"model_type": "timm_wrapper", **TIMM},
        image_token_id=SPECIAL_TOKENS.index(IMAGE_TOKEN),
        cross_attention_layers=[0, 1],
        cross_attention_gate_init=0.5,
    )
    summary = {}
    for model_class in (AgeVlmModel, AgeVlmForConditionalGeneration):
        name = model_class.__name__
        model_class(config).save_pretrained(folder / "age_vlm" / name)
        processor.save_pretrained(folder / "age_vlm" / name)
        summary[name] = {
            "tokenizer_classes": ["PreTrainedTokenizerFast"],
            "processor_classes": ["CLIPImageProcessor"],
        }
    (folder / "reports").mkdir()
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))


# Read by the modules below when they are imported.
tiny_models = tempfile.TemporaryDirectory()
write_tiny_models(Path(tiny_models.name))
os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = tiny_models.name

from ... import test_pipeline_mixin  # noqa: E402
from ...generation.test_utils import GenerationTesterMixin  # noqa: E402
from ...test_configuration_common import ConfigTester  # noqa: E402
from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor  # noqa: E402
from ...test_pipeline_mixin import PipelineTesterMixin  # noqa: E402
from ...vlm_tester import VLMModelTest, VLMModelTester  # noqa: E402


test_pipeline_mixin.transformers_module.AgeVlmProcessor = AgeVlmProcessor


class AgeVlmModelTester:
    gate = 0.5

    def __init__(self, parent):
        self.parent = parent
        self.batch_size, self.seq_length, self.is_training = 3, 7, True
        self.num_hidden_layers, self.hidden_size, self.num_attention_heads, self.vocab_size = 2, 32, 4, 99
        self.image_token_id, self.num_image_tokens, self.pad_token_id = 3, 1, 1

    def get_config(self):
        return AgeVlmConfig(
            text_config=TEXT,
            vision_config={"model_type": "timm_wrapper", **TIMM},
            image_token_id=self.image_token_id,
            cross_attention_layers=[0, 1],
            cross_attention_gate_init=self.gate,
        )

    def prepare_config_and_inputs_for_common(self):
        pixels = floats_tensor([self.batch_size, 3, 32, 32])
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 1) + 1
        ids[ids == self.image_token_id] = self.pad_token_id
        ids[:, 0] = self.image_token_id
        attention_mask = ids.ne(self.pad_token_id).to(torch_device)
        return self.get_config(), {"pixel_values": pixels, "input_ids": ids, "attention_mask": attention_mask}


class ZeroGatesModelTester(AgeVlmModelTester):
    gate = 0.0


class SkipsOfFastVlm:
    skip_test_image_features_output_shape = True

    def _image_features_get_expected_num_hidden_states(self, model_tester=None):
        return 1  # the one map of out_indices

    @unittest.skip("as fast_vlm: Cannot set output_attentions on timm models.")
    def test_get_image_features_attentions(self):
        pass


class AgeVlmTest(SkipsOfFastVlm, ModelTesterMixin, GenerationTesterMixin, PipelineTesterMixin, unittest.TestCase):
    model_tester_class = AgeVlmModelTester
    all_model_classes = (AgeVlmModel, AgeVlmForConditionalGeneration)
    pipeline_model_mapping = {
        "image-text-to-text": AgeVlmForConditionalGeneration,
        "feature-extraction": AgeVlmModel,
    }
    _is_composite = True

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(
            self, config_class=AgeVlmConfig, has_text_modality=False, common_properties=["image_token_id"]
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class ZeroGatesAgeVlmTest(AgeVlmTest):
    model_tester_class = ZeroGatesModelTester


class ClipModelTester(VLMModelTester):
    base_model_class = AgeVlmModel
    config_class = AgeVlmConfig
    text_config_class = LlamaConfig
    vision_config_class = CLIPVisionConfig
    conditional_generation_class = AgeVlmForConditionalGeneration

    def __init__(self, parent, **kwargs):
        kwargs.setdefault("num_image_tokens", 1)
        kwargs.setdefault("cross_attention_layers", [0, 1])
        kwargs.setdefault("cross_attention_gate_init", 0.5)
        super().__init__(parent, **kwargs)


class ClipAgeVlmTest(VLMModelTest, unittest.TestCase):
    model_tester_class = ClipModelTester


class TimmModelTester(ClipModelTester):
    vision_config_class = TimmWrapperConfig

    def __init__(self, parent, **kwargs):
        super().__init__(parent, image_size=32, **kwargs)

    def get_vision_config(self):
        return TimmWrapperConfig(**TIMM)


class TimmAgeVlmTest(SkipsOfFastVlm, VLMModelTest, unittest.TestCase):
    model_tester_class = TimmModelTester
