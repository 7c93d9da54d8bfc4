"""Fine-tunes a checkpoint with LoRA or DoRA and the alignment loss, and saves the adapter with its processor and card.

    python examples/lora_finetune.py
    python examples/lora_finetune.py --images IMAGES --labels LABELS --classes sky building --ignore 11

Without images of your own: drawn scenes. A few minutes on 2 cores. Words that the checkpoint's tokenizer does not know
are added to it, and their embeddings are trained and saved with the adapter.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
from huggingface_hub import ModelCardData
from peft import get_peft_model
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, logging, set_seed

from age_vlm.commands.environment import environment
from age_vlm.commands.fit import train, training_arguments
from age_vlm.commands.recipe import DataRecipe, TrainingRecipe
from age_vlm.commands.sources import load_source
from age_vlm.configuration.configuration_agevlm import LOCAL_FOLDER, is_local
from age_vlm.console import plain_console, plain_table
from age_vlm.data.collator import AgeVlmCollator
from age_vlm.data.label_maps import CAPTION_REQUEST, caption, existence_question
from age_vlm.data.questions import EvaluationItem
from age_vlm.data.scene_questions import scene_texts
from age_vlm.errors import UserError, check_new_folder, run_command
from age_vlm.evaluation.answers import yes_scores
from age_vlm.evaluation.benchmark import split_items
from age_vlm.evaluation.grounding import PhraseAttention, phrase_attention
from age_vlm.evaluation.metrics import auc
from age_vlm.hub import load_checkpoint, save_checkpoint
from age_vlm.training import AgeVlmTrainer, AlignmentConfig
from age_vlm.training.lora import LORA_TARGETS, lora_config


Metrics = dict[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bundled = os.path.relpath(Path(__file__).resolve().parent / "checkpoints" / "age-vlm-scenes")
    parser.add_argument(
        "--model", default=bundled, help="folder or Hub id (default: the repository's example checkpoint)"
    )
    parser.add_argument("--images", help="folder of images; drawn scenes when left out")
    parser.add_argument("--labels", help="folder of PNGs with the same names, one class index a pixel")
    parser.add_argument("--classes", nargs="+", help="names, in the order of their indices")
    parser.add_argument("--ignore", type=int, nargs="*", default=[], help="indices that mean 'not labelled'")
    parser.add_argument("--target", default="both", choices=LORA_TARGETS)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16, help="images a step, each with all its questions")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--validation", type=int, default=100, help="images that the metrics are taken on")
    # The example checkpoint has learned from the scenes of seed 0.
    parser.add_argument("--seed", type=int, default=1, help="of adapter, training images and their order")
    parser.add_argument("--output", default="runs/lora", help="folder of the adapter")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier adapter in that folder; other files in it stay"
    )
    options = parser.parse_args(arguments)
    return run_command("lora_finetune", lambda: run(options))


def run(options: argparse.Namespace) -> None:
    check(options)
    logging.set_verbosity_error()
    recipe = DataRecipe(
        kind="label_maps" if options.images else "scenes",
        train=options.steps * options.batch_size,
        validation=options.validation,
        test=1,
        images=options.images,
        labels=options.labels,
        classes=options.classes,
        ignore=options.ignore,
        crops_per_frame=4,
    )
    training = TrainingRecipe(
        steps=options.steps, batch_size=options.batch_size, learning_rate=options.learning_rate, weight_decay=0.0
    )
    set_seed(options.seed)
    model, processor = load_checkpoint(options.model, "--model")
    source = load_source(recipe, options.seed)
    alignment = model.alignment
    words = add_words(model, processor, source.tokenizer, texts(options.classes))
    if words:
        print(f"Words that are new to the tokenizer, whose embeddings are trained too: {', '.join(words)}.")
    ids = processor.tokenizer.convert_tokens_to_ids(words)
    config = lora_config(options.target, rank=options.rank, use_dora=options.dora, trainable_token_indices=ids or None)
    phrases = phrase_attention(model, processor, source.validation)
    table = {"before": answers(model, processor, source.validation) | looks(phrases, alignment)}

    adapted = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as scratch:
        collator = AgeVlmCollator.from_model(model, processor, independent_turns=True)
        trainer = AgeVlmTrainer(
            adapted,
            training_arguments(training, options.seed, scratch, sys.stderr.isatty()),
            train_dataset=source.train,
            data_collator=collator,
            alignment=alignment,
        )
        train(trainer, sys.stderr.isatty())
    # PEFT has put the adapter into `model` itself: what takes an AGE-VLM takes it as before.
    after = phrase_attention(model, processor, source.validation)
    table["after"] = answers(model, processor, source.validation) | looks(after, alignment)
    table["after, grey image"] = answers(model, processor, [grey(item) for item in source.validation])
    table["chance"] = chance(phrases)
    trained, total = adapted.get_nb_trainable_parameters()

    save_checkpoint(
        adapted, processor, options.output, card(options, len(source.validation), table, trained, total, words)
    )
    show(table, f"{len(source.validation)} validation images, seed {options.seed}")
    print(f"Parameters trained: {trained:,} of {total:,} ({trained / total:.1%})")
    print(f"Adapter: {options.output}")


def check(options: argparse.Namespace) -> None:
    """Raises UserError, one sentence, before anything is loaded."""
    given = [name for name in ("images", "labels", "classes") if getattr(options, name)]
    if given and len(given) < 3:
        raise UserError(f"--images, --labels, --classes: got --{' and --'.join(given)}, expected all three or none.")
    for name in ("rank", "steps", "batch_size", "validation"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: got {getattr(options, name)}, expected at least 1.")
    if not 0 < options.learning_rate < float("inf"):
        raise UserError(f"--learning-rate: got {options.learning_rate}, expected more than 0.")
    if options.seed < 0:
        raise UserError(f"--seed: got {options.seed}, expected at least 0.")
    output = Path(options.output)
    check_new_folder("--output", output)
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        if not options.overwrite:
            raise UserError(f"--output: '{output}' exists, expected a new folder (or --overwrite to replace it).")
        if not (output / "adapter_config.json").is_file():
            raise UserError(f"--output: '{output}' holds no adapter, and is not replaced even with --overwrite.")


def texts(classes: Sequence[str] | None) -> list[str]:
    """Texts with every word that training and validation say."""
    if not classes:
        return list(scene_texts())
    return [
        CAPTION_REQUEST,
        caption(classes)[0],
        "yes, no, nothing",
        *(existence_question(name)[0] for name in classes),
    ]


def add_words(model, processor, splitter: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[str]:
    """Adds to tokenizer and model every word of `texts` that the tokenizer reads as unknown, and returns them."""
    tokenizer = processor.tokenizer
    words = dict.fromkeys(word for text in texts for word in splitter.tokenize(text))
    unknown = [w for w in words if tokenizer.unk_token_id in tokenizer(w, add_special_tokens=False)["input_ids"]]
    if unknown:
        # Whole words: 'car' must not be found in 'carpet'.
        tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in unknown])
        model.resize_token_embeddings(len(tokenizer))
    return unknown


def answers(model, processor, items: Sequence[EvaluationItem]) -> Metrics:
    """Yes/no questions as POPE asks them, half of them about what is not there, by logit(yes) - logit(no)."""
    asked = split_items(items, lambda question: question.mode is not None)
    scores = yes_scores(model, processor, asked)
    questions = [question for item in asked for question in item.questions]
    if not questions:
        raise UserError("validation images: got none that shows one thing and lacks another, expected at least one.")
    truth = [question.answer == "yes" for question in questions]
    given = [scores[question.id] for question in questions]
    right = [(score > 0) == yes for score, yes in zip(given, truth)]
    return {"yes/no accuracy": sum(right) / len(right), "yes/no AUC": auc(given, truth)}


def looks(phrases: PhraseAttention, alignment: AlignmentConfig) -> Metrics:
    """Where the aligned blocks and heads look when they read the name of something visible."""
    mass, hits = phrases.scores(alignment.layers, alignment.head_indices(phrases.attention.shape[2]))
    return {"attention mass in the mask": float(mass.mean()), "pointing accuracy": float(hits.mean())}


def chance(phrases: PhraseAttention) -> Metrics:
    """Answers by a coin, and attention that is the same everywhere."""
    return {
        "yes/no accuracy": 0.5,
        "yes/no AUC": 0.5,
        "attention mass in the mask": float(phrases.coverage.mean()),
        "pointing accuracy": float((phrases.coverage > 0).float().mean()),
    }


def grey(item: EvaluationItem) -> EvaluationItem:
    """The same questions without the image: what language alone gives."""
    return dataclasses.replace(item, image=PIL.Image.new("RGB", item.image.size, "grey"))


def rows(table: dict[str, Metrics]) -> list[list[str]]:
    names = list(dict.fromkeys(name for column in table.values() for name in column))
    cells = [[f"{column[name]:.3f}" if name in column else "-" for column in table.values()] for name in names]
    return [["metric", *table], *([name, *values] for name, values in zip(names, cells))]


def show(table: dict[str, Metrics], title: str) -> None:
    head, *body = rows(table)
    shown = plain_table(head, title)
    for row in body:
        shown.add_row(*row)
    plain_console().print(shown)


CARD = """---
{metadata}
---

# {name}

A {kind} adapter for an [AGE-VLM](https://arxiv.org/abs/2511.17793), {name_of_base}, made by `examples/lora_finetune.py` of age-vlm.

## Use

```python
from age_vlm import AgeVlmForConditionalGeneration, AgeVlmProcessor
from peft import PeftModel

processor = AgeVlmProcessor.from_pretrained("THIS/REPOSITORY")
model = AgeVlmForConditionalGeneration.from_pretrained("{base}")
model.resize_token_embeddings(len(processor.tokenizer))
model = PeftModel.from_pretrained(model, "THIS/REPOSITORY").eval()
```

`model.merge_and_unload()` makes a model without adapter of it. With age-vlm installed, `age-vlm ask --model THIS/REPOSITORY --image
image.png --overlay where.png "question"` does all this, and paints where the model looked.

## How it was made

Adapted: {target}, rank {rank}, and the gates of the cross-attention. {words}Parameters trained: {trained:,} of {total:,}.
Data: {data}. {steps} steps of {batch_size} images, learning rate {learning_rate}, seed {seed}.

## Metrics

On {images} validation images, which were not trained on, one seed. Yes/no questions as POPE asks them, half of them about what is
not there, answered by logit(yes) - logit(no). "grey image" is the same model shown none: what language alone gives. Attention metrics
are of the aligned heads.

{table}

Measured with {environment}.

High attention inside a mask says where the model looked, not that its answer is right.
"""


def card(options, images: int, table: dict[str, Metrics], trained: int, total: int, words: list[str]) -> str:
    hub = None if is_local(options.model) else options.model
    metadata = ModelCardData(
        library_name="peft",
        base_model=hub,
        pipeline_tag="image-text-to-text",
        tags=["age-vlm", "lora", *(["dora"] if options.dora else [])],
        language="en",
    )
    head, *body = ("| " + " | ".join(row) + " |" for row in rows(table))
    return CARD.format(
        metadata=metadata.to_yaml(),
        name=Path(options.output).name,
        kind="DoRA" if options.dora else "LoRA",
        name_of_base=f"`{hub}`" if hub else LOCAL_FOLDER,
        base=hub or "THE/BASE",
        data=f"photographs with the classes {', '.join(options.classes)}" if options.images else "drawn scenes",
        **{name: getattr(options, name) for name in ("rank", "steps", "batch_size", "learning_rate", "seed")},
        target=options.target.replace("_", " ") if options.target != "both" else "cross-attention and language model",
        words=f"New words, with embeddings of their own: {', '.join(words)}. " if words else "",
        trained=trained,
        total=total,
        images=images,
        table="\n".join([head, "|---" * (len(table) + 1) + "|", *body]),
        environment=", ".join(f"{key} {value}" for key, value in environment().items()),
    )


if __name__ == "__main__":
    sys.exit(main())
