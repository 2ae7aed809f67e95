"""What MoEfication, D2DMoE and LTE share: neurons to experts, routers."""
