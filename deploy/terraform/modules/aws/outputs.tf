output "store_url" {
  description = "NEUROLOOP_STORE_URL."
  value       = "s3://${aws_s3_bucket.store.bucket}"
}

output "database_host" {
  description = "Address of PostgreSQL, for deploy/kubernetes/make-secrets."
  value       = aws_db_instance.main.address
}

output "registry" {
  description = "Where the images go, image name -> address; for the overlay's `images`."
  value       = { for name, repository in aws_ecr_repository.image : "neuroloop-${name}" => repository.repository_url }
}

output "identities" {
  description = "Service account -> role, for the overlay's identities.yaml."
  value       = { for name, role in aws_iam_role.part : name => role.arn }
}

output "policies" {
  description = "Service account -> what it may do in the store."
  value       = local.policies
}

output "cluster" {
  description = "Name of the cluster: aws eks update-kubeconfig --name."
  value       = aws_eks_cluster.main.name
}

output "backups_url" {
  description = "BACKUP_TO of the overlay's settings.env: where the nightly backups go."
  value       = "s3://${aws_s3_bucket.backups.bucket}"
}
