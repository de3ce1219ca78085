"""`vtp.text` against open_clip: any caption, and the paper's full-size tower."""
import warnings

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

warnings.filterwarnings("ignore", message="IProgress")
import open_clip  # noqa: E402
from open_clip.transformer import TextTransformer  # noqa: E402

from vtp.text import TextConfig, TextEncoder, bpe, cut  # noqa: E402


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=200), min_size=1, max_size=4), st.sampled_from([8, 77]))
def test_ids(captions, context):
    "Any text at all: open_clip's ids, and the cut drops nothing but padding."
    ids = bpe(captions, context)
    assert ids.equal(open_clip.tokenize(captions, context))
    short = cut(ids)
    assert short.argmax(-1).equal(ids.argmax(-1)) and not ids[:, short.shape[1]:].any()


def test_paper_tower():
    "12 × 768: open_clip's weights load strictly and the features agree in fp32."
    torch.manual_seed(0)
    peer, ours = TextTransformer(width=768, heads=12, layers=12, output_dim=768), TextEncoder(TextConfig())
    ours.load_state_dict(peer.state_dict())
    ids = bpe(["a photo of a dog", "Ein Café, 2 &amp; mehr", "three people on a beach at sunset, one of them holding a surfboard"])
    with torch.no_grad(): torch.testing.assert_close(ours(cut(ids)), peer(ids), rtol=1e-4, atol=1e-5)
