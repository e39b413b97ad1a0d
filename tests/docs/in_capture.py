"""Around fidelity.md's capture: two layers of attention of random weights stand for the model."""
import torch
import torch.nn.functional

HEADS, KV_HEADS, DIM = 4, 2, 64


def plain_attention(q, k, v, is_causal=False):
    """For versions of torch that have no scaled_dot_product_attention yet."""
    logits = q @ k.transpose(-2, -1) / DIM**0.5
    hidden = torch.ones(q.shape[-2], k.shape[-2]).triu(1).bool()
    return torch.softmax(logits.masked_fill(hidden, -float("inf")), -1) @ v


if not hasattr(torch.nn.functional, "scaled_dot_product_attention"):
    torch.nn.functional.scaled_dot_product_attention = plain_attention
torch.manual_seed(1)
embedding = torch.randn(50, HEADS * DIM)
weights = [[torch.randn(HEADS * DIM, n * DIM) / (HEADS * DIM)**0.5
            for n in (HEADS, KV_HEADS, KV_HEADS)] for _ in range(2)]
input_ids = torch.randint(50, (1, 200))


def model(ids):
    x = embedding[ids]
    for layer in weights:
        q, k, v = ((x @ w).reshape(1, x.shape[1], -1, DIM).transpose(1, 2) for w in layer)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + out.transpose(1, 2).reshape(x.shape)


# BLOCK
for name in "qkv":
    assert np.load(f"mymodel.{name}.npy").shape == (2, 200, HEADS, DIM)
