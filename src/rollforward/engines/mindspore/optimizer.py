"""AdamW, one fused kernel for each tensor.

With gradient g, learning rate a, decay d, at step t = 1, 2, ... (Loshchilov and Hutter, "Decoupled
Weight Decay Regularization", arXiv:1711.05101, with the schedule folded into a):

    p <- p (1 - a d)                        tensors of two axes or more; not biases and norms
    m <- b1 m + (1 - b1) g
    v <- b2 v + (1 - b2) g^2
    p <- p - a (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

MindSpore's Adam kernel computes p <- p - a sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps'), which is
the last line for eps' = eps sqrt(1 - b2^t). Everything that depends on t is computed on the host
in double precision, so the graph holds no state except m, v and p.
"""

from collections.abc import Mapping

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from rollforward.grpo.types import OptimizerSettings


class ApplyAdamW(nn.Cell):
    """(scale, then the scalars of `step_scalars`) -> updates parameters and moments in place.

    `gradients` are Parameters too, multiplied by `scale` (clipping) on the way.
    """

    def __init__(
        self,
        parameters: Mapping[str, ms.Parameter],
        gradients: Mapping[str, ms.Parameter],
        settings: OptimizerSettings,
    ) -> None:
        super().__init__()
        names = list(parameters)
        self.parameters_ = ms.ParameterTuple([parameters[name] for name in names])
        self.gradients = ms.ParameterTuple([gradients[name] for name in names])
        self.first = ms.ParameterTuple([_moment("adam_m.", name, parameters[name]) for name in names])
        self.second = ms.ParameterTuple([_moment("adam_v.", name, parameters[name]) for name in names])
        self.decays = tuple(settings.weight_decay > 0 and parameters[name].ndim >= 2 for name in names)
        self.beta1 = ms.Tensor(settings.adam_beta1, ms.float32)
        self.beta2 = ms.Tensor(settings.adam_beta2, ms.float32)
        self.adam = ops.Adam()

    def construct(
        self,
        scale: ms.Tensor,
        learning_rate: ms.Tensor,
        keep: ms.Tensor,
        beta1_power: ms.Tensor,
        beta2_power: ms.Tensor,
        epsilon: ms.Tensor,
    ) -> ms.Tensor:
        """Returns the scale, when all is done."""
        done = scale
        for i in range(len(self.decays)):
            parameter = self.parameters_[i]
            if self.decays[i]:
                done = ops.depend(done, ops.assign(parameter, parameter * keep))
            gradient = self.gradients[i] * ops.depend(scale, done)
            updated = self.adam(
                parameter,
                self.first[i],
                self.second[i],
                beta1_power,
                beta2_power,
                learning_rate,
                self.beta1,
                self.beta2,
                epsilon,
                gradient,
            )
            done = ops.depend(done, updated)
        return done


def step_scalars(step: int, learning_rate: float, settings: OptimizerSettings) -> tuple[ms.Tensor, ...]:
    """What `ApplyAdamW` takes after `scale`, for step 1, 2, ...: float32 scalars."""
    beta1_power = settings.adam_beta1**step
    beta2_power = settings.adam_beta2**step
    values = (
        learning_rate,
        1.0 - learning_rate * settings.weight_decay,
        beta1_power,
        beta2_power,
        settings.eps * (1.0 - beta2_power) ** 0.5,
    )
    return tuple(ms.Tensor(np.float32(value)) for value in values)


def _moment(prefix: str, name: str, like: ms.Parameter) -> ms.Parameter:
    return ms.Parameter(np.zeros(like.shape, dtype=np.float32), name=prefix + name)
