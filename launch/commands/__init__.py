"""The verbs of `farspan`, one file each; `launch.verbs` has their help."""
