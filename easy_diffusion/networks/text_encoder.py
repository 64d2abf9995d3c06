"""From a caption to what the network looks at: states [B, L, D] and a mask [B, L], True = a real token.

Chinese needs no tokenizer to begin with: each character is a word's worth of meaning. CharacterEncoder looks its
characters up in a table and lets a small transformer (Vaswani et al. 2017) put them together, so that 豆 in 土豆 (potato)
and 豆 in 豆腐 (tofu) become different states. It is trained together with the network. An empty caption is a start token
alone: that is the «nothing» of classifier-free guidance.

CnClipEncoder has learned its Chinese from hundreds of millions of pictures with captions. It is large, and stays as it is: the
network learns to read its states. The file needs torch and safetensors, and for CnClipEncoder cn_clip.

>>> encoder = CharacterEncoder("番茄炒鸡蛋土豆汤", dim=64)
>>> states, mask = encoder(["番茄炒鸡蛋", "土豆汤", ""])
>>> tuple(states.shape), mask.sum(dim=1).tolist()
((3, 6, 64), [6, 4, 1])
"""

import contextlib
import hashlib
import io
import re
import warnings
from pathlib import Path

import torch
from torch import nn

from .weights_io import read_tensors


class CharacterEncoder(nn.Module):
    """Captions → states [B, L, dim] and mask bool [B, L]; L is the longest caption of the call and a start token.

    characters: those it knows, in any order. A character it does not know is named in a warning, once, and encoded as
    «unknown». Raises ValueError for a caption of more than max_length - 1 characters.
    """

    PADDING, START, UNKNOWN = 0, 1, 2

    def __init__(self, characters: str, dim: int = 128, layers: int = 2, heads: int = 4, max_length: int = 32):
        super().__init__()
        self.characters, self.dim, self.max_length = "".join(sorted(set(characters))), dim, max_length
        self.index = {character: i + 3 for i, character in enumerate(self.characters)}
        self.warned = set()
        self.embedding = nn.Embedding(len(self.index) + 3, dim)
        self.position = nn.Parameter(torch.randn(max_length, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True,
                                           norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        """int64 [B, L]: start, then each character, then padding."""
        if isinstance(captions, str):
            raise TypeError(f"captions is a list of str: [{captions!r}], not {captions!r}")
        longest = max(captions, key=len)
        if len(longest) >= self.max_length:
            raise ValueError(f"a caption has at most {self.max_length - 1} characters; {longest!r} has {len(longest)}")
        unknown = set("".join(captions)) - self.index.keys() - self.warned
        if unknown:
            self.warned |= unknown
            names = "、".join(sorted(unknown))
            warnings.warn(f"unknown to this encoder, so without a meaning of their own: {names}", stacklevel=3)
        rows = torch.full((len(captions), len(longest) + 1), self.PADDING)
        for row, caption in zip(rows, captions):
            row[:len(caption) + 1] = torch.tensor([self.START] + [self.index.get(c, self.UNKNOWN) for c in caption])
        return rows.to(self.position.device)

    def forward(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.tokenize(captions)
        mask = tokens != self.PADDING                                       # [B, L]
        states = self.embedding(tokens) + self.position[:tokens.shape[1]]   # [B, L, dim]
        states = self.transformer(states, src_key_padding_mask=~mask)       # [B, L, dim]
        return self.norm(states), mask


class CnClipEncoder(nn.Module):
    """Captions → states [B, 52, dim] of Chinese CLIP's text tower (Yang et al. 2022) and their mask; dim is 768 for ViT-B-16.

    source: a checkpoint file as cn_clip publishes and saves them, fine-tuned ones too; a folder that holds one, or that transformers'
    ChineseCLIPModel was saved to; or one of cn_clip's names, "ViT-B-16" ..., which cn_clip downloads. Frozen unless frozen=False: then
    it has no gradient and stays in eval mode, where the same caption has the same states. Captions are cut after 50 tokens.
    Raises FileNotFoundError, or ValueError for a file that is damaged, or is no Chinese CLIP, with what is missing in it.
    """

    LENGTH = 52

    def __init__(self, source, frozen: bool = True):
        super().__init__()
        from cn_clip.clip import available_models
        if str(source) in available_models() and not Path(source).exists():
            state = _download_cn_clip(str(source))
        else:
            state = _read_cn_clip(Path(source))
        self.bert, self.text_projection = _build_text_tower(state, source)
        self.dim, self.frozen = self.bert.config.hidden_size, frozen
        self.requires_grad_(not frozen).eval()

    def train(self, mode: bool = True):
        return super().train(mode and not self.frozen)

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        """int64 [B, 52]: [CLS], the caption's tokens, [SEP], then zeros."""
        from cn_clip.clip import tokenize
        if isinstance(captions, str):
            raise TypeError(f"captions is a list of str: [{captions!r}], not {captions!r}")
        return tokenize(captions, self.LENGTH).to(self.text_projection.device)

    def forward(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.tokenize(captions)
        mask = tokens != 0                                                  # [B, 52]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.bert(tokens, attention_mask=mask.to(self.text_projection.dtype))[0], mask      # [B, 52, dim]

    def pooled(self, states: torch.Tensor) -> torch.Tensor:
        """States [B, 52, dim] → one vector a caption, [B, 512] for ViT-B-16, in the space that Chinese CLIP shares with pictures."""
        return states[:, 0] @ self.text_projection

    def fingerprint(self) -> str:
        """Sixteen characters that change when any weight does."""
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in self.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _download_cn_clip(name):
    """The text tower's tensors of a published model, by cn_clip's own download."""
    from cn_clip.clip import load_from_name
    try:
        with contextlib.redirect_stdout(io.StringIO()):                     # it tells its configuration
            model, _ = load_from_name(name, device="cpu")
    except Exception as error:
        raise RuntimeError(f"cn_clip could not download or load {name}, which a path to a checkpoint would spare: {error}") from error
    return model.state_dict()


def _read_cn_clip(path):
    """All tensors of a checkpoint by cn_clip's names: `bert.…`, `text_projection` [dim, joint], and the vision tower's."""
    if path.is_dir():
        files = [*path.glob("model.safetensors"), *path.glob("pytorch_model.bin"), *path.glob("*.pt")]
        if not files or (files[0].suffix == ".pt" and len(files) > 1):
            raise FileNotFoundError(f"{path} should hold a model.safetensors, a pytorch_model.bin or one .pt file; it holds "
                                    f"{', '.join(file.name for file in files) or 'none'}")
        path = files[0]
    if not path.is_file():
        raise FileNotFoundError(f"no Chinese CLIP at {path}: neither a file nor a folder, nor one of cn_clip's names")
    state = {name.removeprefix("module."): tensor for name, tensor in read_tensors(path).items()}
    if "text_projection.weight" in state:                                   # transformers' names
        state = {re.sub(r"^text_model\.", "bert.", name): tensor for name, tensor in state.items()}
        state["text_projection"] = state.pop("text_projection.weight").T
        return state
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}       # as cn_clip loads them


def _build_text_tower(state, source):
    """cn_clip's BertModel and the projection, filled, float32."""
    from cn_clip.clip.configuration_bert import BertConfig
    from cn_clip.clip.modeling_bert import BertModel
    words = state.get("bert.embeddings.word_embeddings.weight")
    if words is None or "text_projection" not in state:
        raise ValueError(f"{source} is no Chinese CLIP: it has no bert.embeddings.word_embeddings.weight or no text_projection, "
                         f"but {len(state)} other tensors, such as {', '.join(list(state)[:3]) or 'none'}")
    layers = len({name.split(".")[3] for name in state if name.startswith("bert.encoder.layer.")})
    dim = words.shape[1]
    bert = BertModel(BertConfig(
        vocab_size_or_config_json_file=len(words), hidden_size=dim, num_hidden_layers=layers, num_attention_heads=dim // 64,
        intermediate_size=4 * dim, layer_norm_eps=1e-12, hidden_act="gelu"))
    own = bert.state_dict()
    found = {name.removeprefix("bert."): tensor.float() for name, tensor in state.items()
             if name.startswith("bert.") and "pooler" not in name and not name.endswith("position_ids")}
    wrong = [f"missing: bert.{name}" for name in own.keys() - found.keys() if not name.endswith("position_ids")]
    wrong += [f"unknown: bert.{name}" for name in found.keys() - own.keys()]
    wrong += [f"shape of bert.{name}: {tuple(found[name].shape)}, not {tuple(own[name].shape)}"
              for name in own.keys() & found.keys() if own[name].shape != found[name].shape]
    if wrong:
        raise ValueError(f"{source} is no text tower of Chinese CLIP:\n  " + "\n  ".join(sorted(wrong)))
    bert.load_state_dict(found, strict=False)
    return bert, nn.Parameter(state["text_projection"].float())
