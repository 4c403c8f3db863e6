"""The models trained here: what each is trained on, how its text becomes tokens, and its shape."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from pipeline.models.config import ModelConfig
from pipeline.tiny.problems import KINDS, Maker
from pipeline.tiny.tokenizer import train_tokenizer
from pipeline.tiny.unseen import UNSEEN_KINDS, train_unseen_tokenizer

LLADA_SPECIALS = ["<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"]
DREAM_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_layers": 5,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 32,
    "embedding_size": 384,
}
ABOUT = (
    "(`pipeline/tiny/problems.py`): sums of three-digit numbers with carries, two-step word problems,\n"
    "sorting, copying, reversing, and writing fields as JSON"
)
ABOUT_UNSEEN = (
    "(`pipeline/tiny/unseen.py`), none of a kind that the other models know, in another vocabulary:\n"
    "Roman numerals, dates, run lengths, orders from comparisons, shifted letters, and counting"
)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """LLaDA with plain heads and more embedding rows than ids; Dream with a shift, biases and grouped heads."""

    family: str
    shape: Mapping[str, int] = field(default_factory=dict)  # what differs from SHAPE
    kinds: Mapping[str, Maker] = field(default_factory=lambda: KINDS)
    about: str = ABOUT
    held_out: int = 500  # problems in its task file
    make_tokenizer: Callable[[list[str]], Tokenizer] = train_tokenizer

    @property
    def specials(self) -> list[str]:
        return DREAM_SPECIALS if self.family == "dream" else LLADA_SPECIALS

    def tokenizer(self) -> Tokenizer:
        return self.make_tokenizer(self.specials)

    def config(self, tokenizer: Tokenizer) -> ModelConfig:
        dream = self.family == "dream"
        special = {text: i for text, i in tokenizer.get_vocab().items() if text.startswith("<|")}
        shape = SHAPE | dict(self.shape)
        return ModelConfig(
            family=self.family,
            **shape,
            # LLaDA counts its ids, Dream its rows, as the published configs do.
            vocab_size=shape["embedding_size"] if dream else tokenizer.get_vocab_size(),
            max_length=256,
            rope_theta=1e4,
            norm_eps=1e-6 if dream else 1e-5,
            qkv_bias=dream,
            tied_head=False,
            shifted_logits=dream,
            mask_id=special["<|mask|>" if dream else "<|mdm_mask|>"],
            eos_id=special["<|endoftext|>"],
            pad_id=special["<|endoftext|>"],
        )


REFERENCES = {
    "tiny-llada": Reference(family="llada"),
    "tiny-dream": Reference(family="dream", shape={"num_kv_heads": 2}),
    # On which no method is tuned: other problems, other tokens, another shape.
    "tiny-unseen": Reference(
        family="llada",
        shape={
            "intermediate_size": 512,
            "num_layers": 4,
            "num_heads": 8,
            "num_kv_heads": 4,
            "head_dim": 16,
            "embedding_size": 512,
        },
        kinds=UNSEEN_KINDS,
        about=ABOUT_UNSEEN,
        held_out=2000,
        make_tokenizer=train_unseen_tokenizer,
    ),
}
