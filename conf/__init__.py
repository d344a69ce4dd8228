"""Configuration groups: YAML only. `train.yaml` names the defaults; `farspan train --help` lists the groups."""
