"""mergekit: the methods `varm` and `fusechat_sce`, the record of a merge, and the check before one."""
