module "rights" {
  source = "../rights"
}

locals {
  issuer = aws_eks_cluster.main.identity[0].oidc[0].issuer
  actions = {
    read   = ["s3:GetObject"]
    write  = ["s3:PutObject", "s3:AbortMultipartUpload"]
    delete = ["s3:DeleteObject"]
  }
  # identity -> right -> prefixes
  prefixes = {
    for identity, rights in module.rights.rights : identity => {
      for right in ["list", "read", "write", "delete"] : right => [
        for prefix, granted in rights : prefix if contains(granted, right)
      ]
    }
  }
  policies = {
    for identity, rights in local.prefixes : identity => {
      Version = "2012-10-17"
      Statement = concat(
        [for right, actions in local.actions : {
          Sid      = right
          Effect   = "Allow"
          Action   = actions
          Resource = [for prefix in rights[right] : "${local.bucket_arn}/${prefix}*"]
        } if length(rights[right]) > 0],
        [for right in ["list"] : merge(
          {
            Sid      = right
            Effect   = "Allow"
            Action   = ["s3:ListBucket"]
            Resource = [local.bucket_arn]
          },
          # Who lists all names no prefix, and no pattern fits what is not there.
          { for name, pattern in { Condition = { StringLike = { "s3:prefix" = [for prefix in rights[right] : "${prefix}*"] } } } : name => pattern if !contains(rights[right], "") },
        ) if length(rights[right]) > 0],
      )
    }
  }
}

resource "aws_iam_openid_connect_provider" "cluster" {
  url            = local.issuer
  client_id_list = ["sts.amazonaws.com"]
}

resource "aws_iam_role" "part" {
  for_each = local.policies
  name     = "${var.name}-${each.key}"
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Action    = "sts:AssumeRoleWithWebIdentity"
      Principal = { Federated = aws_iam_openid_connect_provider.cluster.arn }
      Condition = { StringEquals = {
        "${trimprefix(local.issuer, "https://")}:aud" = "sts.amazonaws.com"
        "${trimprefix(local.issuer, "https://")}:sub" = "system:serviceaccount:neuroloop:${each.key}"
      } }
    }]
  })
}

resource "aws_iam_role_policy" "part" {
  for_each = local.policies
  name     = "store"
  role     = aws_iam_role.part[each.key].name
  policy   = jsonencode(each.value)
}

resource "aws_iam_role_policy" "backups" {
  name = "backups"
  role = aws_iam_role.part["backup"].name
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      { Effect = "Allow", Action = ["s3:ListBucket"], Resource = [aws_s3_bucket.backups.arn] },
      { Effect = "Allow", Action = flatten(values(local.actions)), Resource = ["${aws_s3_bucket.backups.arn}/*"] },
    ]
  })
}
