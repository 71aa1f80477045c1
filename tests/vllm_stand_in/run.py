"""`python -m heatbath …` with TRL's client of a vLLM server on a machine without CUDA, which it refuses by the device's
name alone. Everything else of TRL's and of heatbath's is as it is."""

import os

import torch
from trl.generation import vllm_client

from heatbath import cli
from heatbath.stages import vllm_server

init_communicator = vllm_client.VLLMClient.init_communicator


def on_any_device(self: vllm_client.VLLMClient, device: object = 0) -> None:
    init_communicator(self, torch.device("cuda"))


class Quick(vllm_client.Retry):
    """TRL's retries without its minute of waiting."""

    def __init__(self, **settings: object):
        super().__init__(**{**settings, "backoff_factor": 0.01})


vllm_client.VLLMClient.init_communicator = on_any_device
vllm_server.has_cuda = lambda: True
if "QUICK" in os.environ:
    vllm_client.Retry = Quick
cli.main()
