locals {
  bucket_arn = "arn:aws:s3:::${var.bucket}"
  images     = toset(["api", "frontend", "mlflow", "airflow"])
  # Policies of the two buckets: nobody comes without TLS.
  tls_only = { for arn in [local.bucket_arn, "${local.bucket_arn}-backups"] : arn => {
    Version = "2012-10-17"
    Statement = [{
      Sid       = "TlsOnly"
      Effect    = "Deny"
      Principal = "*"
      Action    = "s3:*"
      Resource  = [arn, "${arn}/*"]
      Condition = { Bool = { "aws:SecureTransport" = "false" } }
    }]
  } }
}

resource "aws_s3_bucket" "store" {
  bucket        = var.bucket
  force_destroy = !var.protected
}

resource "aws_s3_bucket_public_access_block" "store" {
  bucket                  = aws_s3_bucket.store.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_server_side_encryption_configuration" "store" {
  bucket = aws_s3_bucket.store.id
  rule {
    apply_server_side_encryption_by_default {
      sse_algorithm = "AES256"
    }
  }
}

resource "aws_s3_bucket_versioning" "store" {
  bucket = aws_s3_bucket.store.id
  versioning_configuration {
    status = "Enabled"
  }
}

# What was overwritten or erased is gone for good after a week: an erasure must not live on in old versions.
resource "aws_s3_bucket_lifecycle_configuration" "store" {
  bucket = aws_s3_bucket.store.id
  rule {
    id     = "old-versions"
    status = "Enabled"
    filter {}
    noncurrent_version_expiration {
      noncurrent_days = 7
    }
    abort_incomplete_multipart_upload {
      days_after_initiation = 2
    }
  }
  depends_on = [aws_s3_bucket_versioning.store]
}

resource "aws_s3_bucket_policy" "store" {
  bucket     = aws_s3_bucket.store.id
  policy     = jsonencode(local.tls_only[local.bucket_arn])
  depends_on = [aws_s3_bucket_public_access_block.store]
}

resource "aws_ecr_repository" "image" {
  for_each             = local.images
  name                 = "${var.name}/neuroloop-${each.value}"
  image_tag_mutability = "IMMUTABLE"
  image_scanning_configuration {
    scan_on_push = true
  }
}

# The nightly backups, written by the identity `backup` alone.
resource "aws_s3_bucket" "backups" {
  bucket        = "${var.bucket}-backups"
  force_destroy = !var.protected
}

resource "aws_s3_bucket_public_access_block" "backups" {
  bucket                  = aws_s3_bucket.backups.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_server_side_encryption_configuration" "backups" {
  bucket = aws_s3_bucket.backups.id
  rule {
    apply_server_side_encryption_by_default {
      sse_algorithm = "AES256"
    }
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "backups" {
  bucket = aws_s3_bucket.backups.id
  rule {
    id     = "old-backups"
    status = "Enabled"
    filter {}
    expiration {
      days = var.backup_days
    }
    abort_incomplete_multipart_upload {
      days_after_initiation = 2
    }
  }
}

resource "aws_s3_bucket_policy" "backups" {
  bucket     = aws_s3_bucket.backups.id
  policy     = jsonencode(local.tls_only["${local.bucket_arn}-backups"])
  depends_on = [aws_s3_bucket_public_access_block.backups]
}
