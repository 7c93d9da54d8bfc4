import json

import torch

from age_vlm.commands.environment import environment


def test_the_environment_can_be_written_down():
    assert torch.__version__ in json.dumps(environment())
