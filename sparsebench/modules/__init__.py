"""The sparse modules that methods put into a model; `base` is their contract: site, counter, costs, the kernel that runs."""
