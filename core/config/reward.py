"""Configuration of the reward that PPO optimises."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from core.config.base import Section
from core.functions import NAME as FUNCTION


class Reward(Section):
    """Applied in the order of these fields."""

    model_weight: float = Field(default=1.0, ge=0)
    """With function or url: weight of the reward models' reward, in standard deviations of the reference's samples.
    What PPO optimises is the weighted sum. 0 leaves the reward models out, and nothing is scored by them."""
    function: str | None = None
    """Own reward: `module:function`, in the current folder or where Python finds modules. It is called with lists of
    prompts (messages), responses (texts) and metadata (the columns of data.metadata), and returns a number for each
    response (docs/own-reward.md). Its source is recorded by digest: a change of it makes results out of date."""
    function_weight: float = 1.0
    """Weight of these numbers, which keep their own units."""
    url: str | None = None
    """Own reward from a server of OpenRLHF's shape, with the whole address, such as
    http://127.0.0.1:5000/get_reward. It may not be a server with the gold model: gold stays out of training."""
    url_weight: float = 1.0
    """Weight of the server's numbers, which keep their own units."""
    url_label: str | None = None
    """The column of data.metadata that the server gets as labels (null: it gets nulls)."""
    url_timeout: float = Field(default=180.0, gt=0, json_schema_extra={"decides_result": False})
    """Seconds that the server has for one request. A request that fails is sent three times more."""
    normalise: Literal["calibration", "running", "none"] = "calibration"
    """What the mean and standard deviation of rewards are taken from: the reference's samples on the calibration
    prompts (calibration), or all rollouts so far (running). none leaves rewards in the reward model's own units."""
    shape: Literal["none", "par", "log_sigmoid"] = "none"
    """par: sigmoid(r - center) (arXiv 2502.18770). log_sigmoid: log sigmoid(r - center) (arXiv 2402.00742). Both leave
    little to gain where the proxy is far above its calibration."""
    center: float = 0.0
    """Centre of the shape in normalised units. 0 is the mean of the reference's samples, 1.04 their 85th percentile if
    they are normal."""
    clip: float | None = Field(default=10.0, gt=0)
    """Rewards are clipped to [-clip, clip] before the penalties (null: no clipping)."""
    missing_eos_penalty: float = Field(default=0.0, ge=0)
    """Subtracted from the reward of a response that max_new_tokens cut off."""
    length_penalty: float = Field(default=0.0, ge=0)
    """Subtracted from the reward for each token of the response."""
    overlong_buffer: int | None = Field(default=None, ge=1)
    """DAPO's soft overlong punishment (arXiv 2503.14476): over the last n tokens before generation.max_new_tokens the
    reward falls in a line by overlong_weight (null: it does not)."""
    overlong_weight: float = Field(default=1.0, gt=0)
    """What a response of max_new_tokens loses by that. The paper has 1."""

    @property
    def is_own(self) -> bool:
        """Whether more than reward models is optimised."""
        return bool(self.function or self.url)

    @property
    def in_words(self) -> str:
        """The sum that is optimised where rewards are own ones."""
        own = {self.function: self.function_weight, self.url: self.url_weight}
        model = [f"{self.model_weight:g} x the reward model (in its standard deviations)"] if self.model_weight else []
        return " + ".join([*model, *(f"{weight:g} x {name}" for name, weight in own.items() if name)])

    @model_validator(mode="after")
    def _has_a_source(self) -> Reward:
        if self.model_weight != 1 and not self.is_own:
            raise ValueError("model_weight weighs reward models against an own reward: set function or url too")
        if self.function and not re.fullmatch(FUNCTION, self.function):
            raise ValueError(f"function {self.function!r} is not of the form module:function")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url {self.url!r} does not begin with http:// or https://")
        if self.url and "@" in self.url:
            raise ValueError("url holds a user or a password, which manifests and reports would show: remove it")
        if self.url_label and not self.url:
            raise ValueError("url_label is what url gets as labels: set url too")
        return self
