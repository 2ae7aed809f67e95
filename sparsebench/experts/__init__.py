"""What MoEfication, D2DMoE and LTE share: `clustering` of neurons, `conversion` of FFNs to experts, `routers`, and the
`passes` over data that they are fitted by.
"""
