import pytest
from pydantic import ValidationError

from llamero.publish.config import PublishConfig, Sampling


def test_a_release_needs_a_licence():
    with pytest.raises(ValidationError, match="license"):
        PublishConfig.model_validate({})


@pytest.mark.parametrize(
    "wrong",
    [{"license": "Apache 2.0"}, {"languages": ["English"]}, {"repository": "no-owner"}, {"sampling": {"top_p": 1.5}}],
)
def test_what_the_hub_would_refuse_is_refused(wrong):
    with pytest.raises(ValidationError):
        PublishConfig.model_validate({"license": "mit", **wrong})


def test_only_what_is_set_goes_into_the_generation_config():
    assert Sampling().to_generation_config() == {}
    assert Sampling(top_p=0.9).to_generation_config() == {"do_sample": True, "top_p": 0.9}
