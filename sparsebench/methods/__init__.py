"""One file per method, or a folder where a method has parts of its own; the contract is in `base`.

A method is found by its YAML in conf/method/, whose `_target_` names its class: there is no registry.
"""
