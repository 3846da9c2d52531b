from llamero.model.config import LlamaConfig
from llamero.model.rope import Default
from llamero.quantize.needs import needs

LLAMA_70B = LlamaConfig(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    rope=Default(10000.0, 128),
    max_position_embeddings=4096,
)


def test_activations_of_70b_wait_in_a_file():
    found = needs(LLAMA_70B, [4096] * 64)
    assert found.file == 2 * 262_144 * 8192 * 2


def test_memory_does_not_grow_with_the_depth_or_with_text_that_waits_in_a_file():
    few, many = needs(LLAMA_70B, [4096] * 64), needs(LLAMA_70B, [4096] * 128)
    assert few.memory == many.memory
    shallow = LlamaConfig(**{**vars(LLAMA_70B), "num_layers": 2})
    assert needs(shallow, [4096] * 64).memory == few.memory
    assert needs(shallow, [4096] * 64).kept == few.kept // 40


def test_the_pass_alone_stays_below_16_gib():
    assert needs(LLAMA_70B, [4096] * 64, solve=False).memory < 16 * 2**30
