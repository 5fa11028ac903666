"""Classification heads: how they start, what they look at, and the neighbours' vote."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cae.architecture import Architecture
from cae.heads import AttentiveHead, Classifier, LinearHead, knn_predict
from cae.model import Encoder

MakeArchitecture = Callable[..., Architecture]


def test_the_linear_head_standardises_its_features_without_learning_how() -> None:
    head = LinearHead(64, 50)
    assert {name for name, _ in head.named_parameters()} == {"fc.weight", "fc.bias"}
    assert head.norm.eps == 1e-6
    assert head.fc.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert (head.fc.bias == 0).all()
    features = 5 + 3 * torch.randn(200, 64)
    standard = (features - features.mean(0)) / features.std(0, unbiased=False)
    torch.testing.assert_close(head(features), standard @ head.fc.weight.T, rtol=1e-3, atol=1e-4)


def test_the_linear_head_remembers_the_features_for_evaluation() -> None:
    head = LinearHead(8, 3)
    for _ in range(200):
        head(5 + 3 * torch.randn(64, 8))
    head.eval()
    assert head(torch.full((1, 8), 5.0)).abs().max() < 0.02


def test_the_attentive_head_starts_with_a_zero_query_and_keys_without_bias() -> None:
    head = AttentiveHead(16, 2, 5)
    assert (head.query == 0).all()
    assert head.query.requires_grad
    names = {name for name, _ in head.named_parameters()}
    assert {name for name in names if "attn" in name} == {
        "attn.qkv.weight",
        "attn.q_bias",
        "attn.v_bias",
        "attn.proj.weight",
        "attn.proj.bias",
    }
    assert "classifier.norm.weight" not in names
    bound = (6 / 32) ** 0.5
    for weight in head.attn.qkv.weight.chunk(3):
        assert 0.95 * bound < weight.abs().max() <= bound


def test_the_attentive_head_at_its_start_is_the_mean_of_its_values() -> None:
    # The zero query leaves LayerNorm as zero, so every token weighs the same.
    head = AttentiveHead(16, 2, 5).eval()
    tokens = torch.randn(3, 7, 16)
    _, _, v_weight = head.attn.qkv.weight.chunk(3)
    pooled = head.attn.proj((head.norm_v(tokens) @ v_weight.T).mean(1))
    torch.testing.assert_close(head(tokens), head.classifier(pooled))


def test_the_attentive_head_normalises_query_keys_and_values_each_its_own_way() -> None:
    head = AttentiveHead(16, 2, 5).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    tokens = torch.randn(3, 7, 16)
    query = head.norm_q(head.query).expand(3, -1, -1)
    pooled = head.attn.cross(query, head.norm_k(tokens), head.norm_v(tokens))
    torch.testing.assert_close(head(tokens), head.classifier(pooled[:, 0]))


def test_the_attentive_head_learns_to_choose_among_tokens() -> None:
    head = AttentiveHead(16, 2, 5)
    F.cross_entropy(head(torch.randn(6, 7, 16)), torch.arange(6) % 5).backward()
    for name in ("attn.q_bias", "norm_q.bias"):
        gradient = head.get_parameter(name).grad
        assert gradient is not None
        assert gradient.abs().max() > 0, name
    with torch.no_grad():
        head.query += torch.randn(16)
    head.eval()
    tokens = torch.randn(3, 7, 16)
    logits = head(tokens)
    torch.testing.assert_close(logits, head(tokens.flip(1)))
    louder = tokens.clone()
    louder[:, 2] = torch.randn(16)
    assert not torch.allclose(logits, head(louder))


def test_the_classifier_starts_with_logits_near_zero(make_architecture: MakeArchitecture) -> None:
    classifier = Classifier(Encoder(make_architecture(width=64, final_norm="pooled")), 64, 10)
    logits = classifier(torch.randn(4, 3, 8, 10))
    assert logits.shape == (4, 10)
    assert 0 < logits.abs().max() < 0.001
    assert classifier.head.weight.std().item() == pytest.approx(0.02 * 0.001, rel=0.15)
    assert (classifier.head.bias == 0).all()


def test_the_classifier_leaves_the_encoders_final_norm_out(make_architecture: MakeArchitecture) -> None:
    encoder = Encoder(make_architecture(final_norm="pooled"))
    classifier = Classifier(encoder, 16, 4).eval()
    images = torch.randn(2, 3, 8, 10)
    x = torch.cat([encoder.cls_token.expand(2, -1, -1), encoder.embed(images)], dim=1)
    for block in encoder.blocks:
        x = block(x)
    expected = classifier.head(F.layer_norm(x[:, 1:].mean(1), (16,), eps=1e-6))
    torch.testing.assert_close(classifier(images), expected)
    assert not [name for name, _ in classifier.named_parameters() if name.startswith("encoder.norm")]


def test_the_classifier_pools_patches_without_the_class_token(make_architecture: MakeArchitecture) -> None:
    encoder = Encoder(make_architecture(depth=1, final_norm="pooled"))
    classifier = Classifier(encoder, 16, 4).eval()
    # Gains of zero: tokens stay what they are, so only a token that is pooled can matter.
    with torch.no_grad():
        for block in encoder.blocks:
            block.ls1.gamma.zero_()
            block.ls2.gamma.zero_()
    images = torch.randn(2, 3, 8, 10)
    before = classifier(images)
    with torch.no_grad():
        encoder.cls_token += torch.randn(16)
    assert torch.equal(classifier(images), before)


def test_the_classifier_trains_the_whole_encoder(make_architecture: MakeArchitecture) -> None:
    classifier = Classifier(Encoder(make_architecture(final_norm="pooled")), 16, 4)
    nn.init.normal_(classifier.head.weight)
    F.cross_entropy(classifier(torch.randn(4, 3, 8, 10)), torch.arange(4)).backward()
    for name, parameter in classifier.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


BANK = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]])
LABELS = torch.tensor([0, 0, 1, 2])


def test_neighbours_vote_by_similarity() -> None:
    queries = torch.tensor([[1.0, 0.05], [0.1, 1.0], [-1.0, 0.1]])
    scores = knn_predict(queries, BANK, LABELS, k=2, temperature=0.1, num_classes=4)
    assert scores.argmax(1).tolist() == [0, 1, 2]
    assert scores.shape == (3, 4)
    assert (scores[:, 3] == 0).all()
    assert (scores[0, 1:] == 0).all()


def test_a_vote_is_the_exponential_of_similarity_over_temperature() -> None:
    query = torch.tensor([[0.7, 0.4]])
    scores = knn_predict(query, BANK, LABELS, k=4, temperature=0.3, num_classes=3)[0]
    votes = (F.cosine_similarity(query, BANK) / 0.3).exp()
    expected = torch.stack([votes[:2].sum(), votes[2], votes[3]])
    torch.testing.assert_close(scores / scores.sum(), expected / expected.sum())


def test_a_very_low_temperature_leaves_the_nearest_alone() -> None:
    scores = knn_predict(torch.tensor([[0.1, 1.0]]), BANK, LABELS, k=4, temperature=1e-4, num_classes=3)
    assert scores.isfinite().all()
    assert scores.argmax() == 1


def test_the_length_of_a_feature_does_not_matter() -> None:
    queries = torch.randn(5, 2)
    scale_q, scale_b = torch.rand(5, 1) + 0.1, torch.rand(4, 1) + 0.1
    plain, scaled = (
        knn_predict(q, b, LABELS, k=3, temperature=0.5, num_classes=3)
        for q, b in ((queries, BANK), (queries * scale_q, BANK * scale_b))
    )
    torch.testing.assert_close(plain, scaled, rtol=1e-4, atol=1e-5)


def test_a_higher_temperature_evens_the_votes_out() -> None:
    # The nearest is of class 1, the next two of class 0: the nearest wins while temperature is low.
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    votes = [
        knn_predict(torch.tensor([[1.0, 0.0]]), bank, torch.tensor([1, 0, 0]), k=3, temperature=t, num_classes=2)
        for t in (0.07, 10.0)
    ]
    assert [vote.argmax().item() for vote in votes] == [1, 0]


def test_more_neighbours_than_there_are_means_all_of_them() -> None:
    queries = torch.randn(3, 2)
    few, many = (knn_predict(queries, BANK, LABELS, k=k, temperature=0.5, num_classes=3) for k in (4, 100))
    assert torch.equal(few, many)


def test_chunks_of_queries_come_back_in_order() -> None:
    queries = torch.randn(2500, 2)
    whole = knn_predict(queries, BANK, LABELS, k=2, temperature=0.5, num_classes=3)
    assert whole.shape == (2500, 3)
    for start in (0, 1020, 2400):
        part = slice(start, start + 100)
        alone = knn_predict(queries[part], BANK, LABELS, k=2, temperature=0.5, num_classes=3)
        torch.testing.assert_close(whole[part], alone, rtol=1e-4, atol=1e-5)
