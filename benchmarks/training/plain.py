"""A CAE step as one would write it down first; what `cae` is measured against.

Eager, float32, patches picked by boolean masks, softmax attention written out, a second encoder for the alignment
whose parameters are pointed at the encoder's in every step, all logits at once, plain AdamW. It computes what the
official release computes, under its parameter names; tests hold it against ours. Nothing is tuned here on purpose.
"""

import copy

import torch
from torch import Tensor, nn

from cae.positions import sincos_positions

NORM_EPS = 1e-6


class DropPath(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1 - self.rate
        mask = (keep + torch.rand(x.shape[0], 1, 1, dtype=x.dtype, device=x.device)).floor()
        return x.div(keep) * mask


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (width // num_heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = nn.functional.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attention = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(b, n, d))


class CrossAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (width // num_heads) ** -0.5
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        b, m, d = query.shape
        q = nn.functional.linear(query, self.q.weight, self.q_bias)
        k = nn.functional.linear(key, self.k.weight)
        v = nn.functional.linear(value, self.v.weight, self.v_bias)
        q, k, v = (x.reshape(b, x.shape[1], self.num_heads, -1).permute(0, 2, 1, 3) for x in (q, k, v))
        attention = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(b, m, d))


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width)
        self.gamma_1 = nn.Parameter(layer_scale * torch.ones(width))
        self.gamma_2 = nn.Parameter(layer_scale * torch.ones(width))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class RegressorBlock(nn.Module):
    def __init__(self, width: int, num_heads: int, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.norm1_q = nn.LayerNorm(width, eps=NORM_EPS)
        self.norm1_k = nn.LayerNorm(width, eps=NORM_EPS)
        self.norm1_v = nn.LayerNorm(width, eps=NORM_EPS)
        self.norm2_cross = nn.LayerNorm(width, eps=NORM_EPS)
        self.cross_attn = CrossAttention(width, num_heads)
        self.mlp_cross = Mlp(width)
        self.gamma_1_cross = nn.Parameter(layer_scale * torch.ones(width))
        self.gamma_2_cross = nn.Parameter(layer_scale * torch.ones(width))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, context: Tensor, positions_q: Tensor, positions_k: Tensor) -> Tensor:
        attended = self.cross_attn(
            self.norm1_q(x + positions_q), self.norm1_k(context + positions_k), self.norm1_v(context)
        )
        x = self.norm2_cross(x + self.drop_path(self.gamma_1_cross * attended))
        return x + self.drop_path(self.gamma_2_cross * self.mlp_cross(x))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    def __init__(
        self,
        grid: tuple[int, int],
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        layer_scale: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(width, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_positions(grid, width)[None], requires_grad=False)
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(Block(width, num_heads, layer_scale, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Class token and the patches that are not masked."""
        x = self.patch_embed(images)
        b, _, d = x.shape
        x = torch.cat((self.cls_token.expand(b, -1, -1), x), dim=1) + self.pos_embed
        visible = x[:, 1:][~mask].reshape(b, -1, d)
        x = torch.cat((x[:, :1], visible), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Regressor(nn.Module):
    def __init__(self, width: int, depth: int, num_heads: int, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.regressor_blocks = nn.ModuleList(RegressorBlock(width, num_heads, layer_scale, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, queries: Tensor, visible: Tensor, positions_m: Tensor, positions_v: Tensor) -> Tensor:
        for block in self.regressor_blocks:
            context = torch.cat((visible, queries), dim=1)
            queries = block(queries, context, positions_m, torch.cat((positions_v, positions_m), dim=1))
        return self.norm(queries)


class Decoder(nn.Module):
    def __init__(
        self, width: int, depth: int, num_heads: int, layer_scale: float, drop_path: float, vocab_size: int
    ) -> None:
        super().__init__()
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.decoder_blocks = nn.ModuleList(Block(width, num_heads, layer_scale, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.decoder_blocks:
            x = block(x)
        return self.head(self.norm(x))


class PlainCae(nn.Module):
    """Encoder, alignment encoder, regressor and decoder, of one width."""

    def __init__(
        self,
        grid: tuple[int, int],
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        predictor_depth: int,
        vocab_size: int,
        layer_scale: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(grid, patch_size, width, depth, num_heads, layer_scale, drop_path)
        self.regresser = Regressor(width, predictor_depth, num_heads, layer_scale, drop_path)
        self.decoder = Decoder(width, predictor_depth, num_heads, layer_scale, drop_path, vocab_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.rd_pos_embed = nn.Parameter(sincos_positions(grid, width)[None], requires_grad=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for weight in (self.encoder.cls_token, self.mask_token, self.encoder.patch_embed.proj.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        self.alignment_encoder = copy.deepcopy(self.encoder)
        for parameter in self.alignment_encoder.parameters():
            parameter.requires_grad = False

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, predicted representations and their targets, of the masked patches. `mask` is bool [b, n]."""
        z_v = self.encoder(images, mask)[:, 1:]
        with torch.no_grad():
            for ours, theirs in zip(self.alignment_encoder.parameters(), self.encoder.parameters(), strict=True):
                ours.data = theirs.detach().data
            z_m_target = self.alignment_encoder(images, ~mask)[:, 1:]
        b, _, d = z_v.shape
        positions = self.rd_pos_embed[:, 1:].expand(b, -1, -1)
        positions_v = positions[~mask].reshape(b, -1, d)
        positions_m = positions[mask].reshape(b, -1, d)
        queries = self.mask_token.expand(b, positions_m.shape[1], -1)
        z_m = self.regresser(queries, z_v, positions_m, positions_v)
        return self.decoder(z_m + positions_m), z_m, z_m_target


class PlainStep:
    """One training step: forward pass, losses, backward pass, clipped AdamW."""

    def __init__(
        self, model: PlainCae, alignment_weight: float, clip_grad: float, lr: float, weight_decay: float
    ) -> None:
        self.model, self.alignment_weight, self.clip_grad = model, alignment_weight, clip_grad
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # The weight decay of all is the same here; which parameters have none costs nothing.
        self.optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)

    def __call__(self, images: Tensor, mask: Tensor, tokens: Tensor) -> float:
        """`images` are normalised float32, `mask` bool [b, n], `tokens` int64 [b, n]."""
        loss = self.loss(images, mask, tokens)
        value = loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        return value

    def loss(self, images: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        logits, z_m, z_m_target = self.model(images, mask)
        decoding = nn.CrossEntropyLoss()(logits.float().flatten(0, 1), tokens[mask])
        alignment = nn.MSELoss()(z_m.float(), z_m_target.detach().float())
        return decoding + self.alignment_weight * alignment
